//! The engine as a whole: takes the locks, opens ring and logs, replays, starts its threads, stops them.
//!
//! Threads: the worker (data), control (sessions), two for maintenance (segments, checkpoints).

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const positions = @import("../format/positions.zig");
const routes = @import("../format/routes.zig");
const os = @import("os.zig");
const Failure = @import("failure.zig").Failure;
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;
const Flush = @import("route.zig").Flush;
const RingMemory = @import("ring_memory.zig").RingMemory;
const ServedRing = @import("served_ring.zig").ServedRing;
const Events = @import("events.zig").Events;
const Control = @import("control.zig").Control;
const Worker = @import("worker.zig").Worker;
const Recovered = @import("worker.zig").Recovered;
const replay_module = @import("replay.zig");
const Replay = replay_module.Replay;
const EngineKind = @import("disk/applier.zig").EngineKind;
const maintenance = @import("maintenance.zig");
const steps = @import("steps.zig");
const log_module = @import("wal/log.zig");
const Log = log_module.Log;
const storage_module = @import("wal/storage.zig");
const Stub = @import("stub.zig").Stub;

pub const RouteSettings = struct {
    name: []const u8,
    pattern: []const u8,
    flags: routes.Flags,
    flush: Flush,
    segment_bytes: u64,
    log_bytes_max: u64,
};

pub const Settings = struct {
    control_socket: []const u8,
    control_mode: u32,
    control_gid: i32,
    ring_path: []const u8,
    log_directory: []const u8,
    allow_volatile: bool,
    null_sink: bool,
    disk_engine: EngineKind,
    ring_per_client: bool,
    no_sync: bool,
    /// Not null: the engine is the test stub, and this its table.
    stub_path: ?[]const u8,
    /// Of every log: how long segments are kept that the checkpoint has passed.
    log_age_max_ns: u64,
    checkpoint_bytes: u64,
    checkpoint_interval_ms: u32,
    routes: []const RouteSettings,
    /// Called by the starting thread while a route's replay takes long.
    progress: ?replay_module.Progress,
};

/// How long a start waits for the last queued write of a daemon that was killed.
const log_lock_wait_ns = 10 * std.time.ns_per_s;

pub const Engine = struct {
    allocator: std.mem.Allocator,
    state: State,
    control: Control,
    worker: Worker,
    storage: storage_module.LinuxStorage,
    log_age_max_ns: u64,
    serving: bool,
    progress: ?replay_module.Progress,
    socket_lock_fd: i32,
    log_lock_fd: i32,
    socket_path: [:0]u8,
    control_thread: std.Thread,
    worker_thread: std.Thread,
    segments_thread: std.Thread,
    checkpoints_thread: std.Thread,

    pub fn start(allocator: std.mem.Allocator, settings: *const Settings, failure: *Failure) error{Failed}!*Engine {
        raiseLimits();
        steps.arm();
        const engine = allocator.create(Engine) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for the engine", .{});
        errdefer allocator.destroy(engine);
        engine.allocator = allocator;
        engine.serving = false;
        engine.log_age_max_ns = settings.log_age_max_ns;
        engine.progress = settings.progress;

        const socket_path = try text(allocator, settings.control_socket, failure);
        engine.socket_path = socket_path;
        errdefer allocator.free(socket_path);
        engine.socket_lock_fd = try lockSocket(socket_path, failure);
        errdefer os.close(engine.socket_lock_fd);

        const log_directory = try text(allocator, settings.log_directory, failure);
        errdefer allocator.free(log_directory);
        try checkLogDirectory(log_directory, settings.allow_volatile, failure);

        const ring_path = try text(allocator, settings.ring_path, failure);
        errdefer allocator.free(ring_path);
        var ring_memory = try RingMemory.open(ring_path, failure);
        errdefer ring_memory.close();
        engine.log_lock_fd = try lockLog(log_directory, failure);
        errdefer os.close(engine.log_lock_fd);
        const eventfd = switch (os.descriptor(linux.eventfd(0, linux.EFD.CLOEXEC | linux.EFD.NONBLOCK))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot make an eventfd: {s}", .{Failure.nameOf(errno)}),
        };
        errdefer os.close(eventfd);

        engine.state = .{
            .allocator = allocator,
            .events = .{ .counters = &engine.state.counters },
            .null_sink = settings.null_sink,
            .disk_engine = settings.disk_engine,
            .ring_per_client = settings.ring_per_client,
            .checkpoint_bytes = settings.checkpoint_bytes,
            .checkpoint_interval_ns = @as(u64, settings.checkpoint_interval_ms) * std.time.ns_per_ms,
            .log_directory = log_directory,
            .ring_path = ring_path,
            .control_eventfd = eventfd,
        };
        const state = &engine.state;
        if (ring_memory.replaces_lost) state.events.post(.@"error", "ring_lost", .{
            .ring = 0,
            .uid = ring_memory.uid,
            .reason = "somebody had cut its file short; what is left of it has \"" ++ RingMemory.lost_suffix ++ "\" behind its name",
        });
        engine.storage = storage_module.LinuxStorage.init(.{ .no_sync = settings.no_sync });
        if (settings.stub_path) |path| {
            const table_path = try text(allocator, path, failure);
            defer allocator.free(table_path);
            state.stub = try Stub.open(allocator, state, table_path, failure);
        }
        const listen_fd = try listen(socket_path, settings, failure);
        const shared = try ServedRing.create(allocator, ring_memory, 0, &state.counters, failure);
        engine.control = try Control.init(state, shared, listen_fd, failure);

        var recovered = Recovered{};
        const order = try engine.openRoutes(settings.routes, failure);
        defer allocator.free(order);
        try engine.openLeftovers(failure);
        try engine.replayAll(&recovered, failure);
        try engine.control.publishRoutes(order, failure);

        engine.worker = try Worker.init(state, recovered, engine.log_lock_fd, failure);
        shared.takeOver();
        engine.worker.serveRing(shared);
        var ready = std.Thread.ResetEvent{};
        var refused: i32 = 0;
        engine.worker_thread = try spawn(failure, Worker.run, .{ &engine.worker, &refused, &ready });
        ready.wait();
        if (refused != 0) {
            engine.worker_thread.join();
            return failure.set(refused, "io_uring is not to be had: {s}. The kernel is older than 6.1, io_uring is switched off (sysctl kernel.io_uring_disabled) or a container's seccomp profile forbids it", .{Failure.nameOf(refused)});
        }
        engine.segments_thread = try spawn(failure, maintenance.prepareSegments, .{state});
        engine.checkpoints_thread = try spawn(failure, maintenance.checkpointRoutes, .{state});
        engine.serving = true;
        engine.control_thread = try spawn(failure, Control.run, .{&engine.control});
        if (state.stub) |stub| try stub.serve(&engine.control, failure);
        return engine;
    }

    /// Drains, checkpoints, ends the threads, frees everything. false: not all was drained within the limit;
    /// what is left stays in ring and log.
    pub fn stop(engine: *Engine, timeout_ns: u64) bool {
        const state = &engine.state;
        @atomicStore(u64, &state.stop_deadline_ns, os.monotonicNs() + timeout_ns, .release);
        @atomicStore(bool, &state.stopping, true, .release);
        for (0..state.routeCount()) |index| state.route(@intCast(index)).log.hurry();
        state.wakeWorker();
        if (state.stub) |stub| stub.endServing();
        engine.worker_thread.join();
        state.wakeMaintenance();
        engine.segments_thread.join();
        engine.checkpoints_thread.join();
        // Clients learn of it by the hang-up; what they put into the ring from now on waits for the next start.
        if (isSocket(engine.socket_path) == true) _ = linux.unlink(engine.socket_path);
        engine.control.stop();
        engine.control_thread.join();
        const drained = state.drained;
        state.events.close();
        return drained;
    }

    /// After `stop`, once nobody reads events any more.
    pub fn destroy(engine: *Engine) void {
        // A thread that hangs in a file system still looks at all this: it goes with the process.
        if (engine.worker.isStuck() or engine.control.isStuck()) return;
        const state = &engine.state;
        const allocator = engine.allocator;
        engine.worker.deinit();
        engine.control.deinit();
        for (0..state.routeCount()) |index| {
            const route = state.route(@intCast(index));
            route.log.close();
            route.replayed.deinit(allocator);
            allocator.free(route.name);
            allocator.free(route.pattern);
            allocator.destroy(route);
        }
        if (state.stub) |stub| stub.close(allocator);
        os.close(state.control_eventfd);
        allocator.free(state.log_directory);
        allocator.free(state.ring_path);
        os.close(engine.log_lock_fd);
        os.close(engine.socket_lock_fd);
        allocator.free(engine.socket_path);
        allocator.destroy(engine);
    }

    /// Any thread. The old routes stay in force where this fails.
    pub fn setRoutes(engine: *Engine, wanted: []const RouteSettings, failure: *Failure) error{Failed}!void {
        engine.control.mutex.lock();
        defer engine.control.mutex.unlock();
        const order = try engine.openRoutes(wanted, failure);
        defer engine.allocator.free(order);
        try engine.control.publishRoutes(order, failure);
        for (0..engine.state.routeCount()) |index| {
            const route = engine.state.route(@intCast(index));
            route.configured = std.mem.indexOfScalar(*Route, order, route) != null;
        }
        engine.state.events.post(.info, "routes_changed", .{ .routes = order.len });
    }

    /// The routes of that order, made where they are new, changed in place where they are not. Caller frees.
    fn openRoutes(engine: *Engine, wanted: []const RouteSettings, failure: *Failure) error{Failed}![]*Route {
        const allocator = engine.allocator;
        const order = allocator.alloc(*Route, wanted.len) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for {d} routes", .{wanted.len});
        errdefer allocator.free(order);
        for (wanted, order) |*settings, *slot| {
            const route = engine.routeNamed(settings.name) orelse try engine.makeRoute(settings.name, settings.segment_bytes, settings.log_bytes_max, failure);
            const pattern = allocator.dupe(u8, settings.pattern) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for a route's pattern", .{});
            allocator.free(route.pattern);
            route.pattern = pattern;
            route.flags = settings.flags;
            route.setFlush(settings.flush);
            route.configured = true;
            slot.* = route;
        }
        return order;
    }

    fn routeNamed(engine: *Engine, name: []const u8) ?*Route {
        for (0..engine.state.routeCount()) |index| {
            const route = engine.state.route(@intCast(index));
            if (std.mem.eql(u8, route.name, name)) return route;
        }
        return null;
    }

    fn makeRoute(engine: *Engine, name: []const u8, segment_bytes: u64, log_bytes_max: u64, failure: *Failure) error{Failed}!*Route {
        const allocator = engine.allocator;
        const state = &engine.state;
        const index = state.routeCount();
        if (index == positions.routes_max) return failure.set(@intFromEnum(linux.E.MFILE), "more than {d} routes (those with a log and no longer configured count too): remove logs that are not needed", .{positions.routes_max});
        const out_of_memory = "out of memory for route {s}";
        const owned = allocator.dupe(u8, name) catch return failure.set(@intFromEnum(linux.E.NOMEM), out_of_memory, .{name});
        errdefer allocator.free(owned);
        const route = allocator.create(Route) catch return failure.set(@intFromEnum(linux.E.NOMEM), out_of_memory, .{name});
        errdefer allocator.destroy(route);
        const directory = std.fmt.allocPrint(allocator, "{s}/{s}", .{ state.log_directory, name }) catch return failure.set(@intFromEnum(linux.E.NOMEM), out_of_memory, .{name});
        defer allocator.free(directory);
        var explanation = log_module.Explanation{};
        const storage = if (state.stub) |stub| stub.storage() else engine.storage.storage();
        const log = Log.open(allocator, storage, directory, .{
            .segment_bytes = segment_bytes,
            .log_bytes_max = log_bytes_max,
            .age_max_ns = engine.log_age_max_ns,
            .direct = !steps.logIsBuffered(),
            .explanation = &explanation,
        }) catch |err|
            return failure.set(errnoOf(err), "cannot open the log of route {s} in {s}: {s}. {s}", .{ name, directory, @errorName(err), explanation.text() });
        route.* = .{ .index = index, .name = owned, .pattern = &.{}, .flags = .{}, .configured = false, .log = log };
        if (engine.serving) {
            // A route that came with a reload. Its directory is new, but for what somebody may have put there.
            var recovered = Recovered{};
            defer recovered.deinit(allocator);
            try engine.replayRoute(route, &recovered, failure);
        }
        state.addRoute(route);
        return route;
    }

    /// Logs whose route is gone from the configuration: what they hold is applied all the same.
    fn openLeftovers(engine: *Engine, failure: *Failure) error{Failed}!void {
        var directory = std.fs.openDirAbsolute(engine.state.log_directory, .{ .iterate = true }) catch |err|
            return failure.set(@intFromEnum(linux.E.IO), "cannot read the log directory {s}: {s}", .{ engine.state.log_directory, @errorName(err) });
        defer directory.close();
        var iterator = directory.iterate();
        while (iterator.next() catch null) |entry| {
            if (entry.kind != .directory or engine.routeNamed(entry.name) != null) continue;
            // No route's name has a dot: `quarantine.d` and whatever else people put there.
            if (entry.name.len > routes.name_bytes_max or std.mem.indexOfScalar(u8, entry.name, '.') != null) continue;
            _ = try engine.makeRoute(entry.name, default_segment_bytes, default_log_bytes_max, failure);
        }
    }

    pub const default_segment_bytes = 64 << 20;
    pub const default_log_bytes_max = 4 << 30;

    fn replayAll(engine: *Engine, recovered: *Recovered, failure: *Failure) error{Failed}!void {
        for (0..engine.state.routeCount()) |index| try engine.replayRoute(engine.state.route(@intCast(index)), recovered, failure);
    }

    /// Brings what a route's log holds above its checkpoint into the files. The worker does not know the route yet.
    fn replayRoute(engine: *Engine, route: *Route, recovered: *Recovered, failure: *Failure) error{Failed}!void {
        const state = &engine.state;
        {
            const run_memory = engine.allocator.alloc(u8, replay_module.run_bytes_max) catch
                return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory while replaying route {s}", .{route.name});
            defer engine.allocator.free(run_memory);
            var replay = Replay{
                .tell = engine.progress,
                .begun_ns = os.monotonicNs(),
                .run_memory = run_memory,
                .state = state,
                .route = route,
                .recovered = recovered,
            };
            defer replay.deinit();
            const out_of_descriptors = "cannot replay the log of route {s}: it needs more files at a time than this daemon may have open. The log is untouched; raise RLIMIT_NOFILE (ulimit -Hn, LimitNOFILE= of its service) and start again";
            const recovery = route.log.recover(replay.visitor()) catch |err| {
                if (replay.out_of_descriptors) return failure.set(@intFromEnum(linux.E.MFILE), out_of_descriptors, .{route.name});
                return failure.set(errnoOf(err), "cannot replay the log of route {s}: {s}. The log is untouched; free memory or mend its disk, and start again", .{ route.name, @errorName(err) });
            };
            replay.locateAll() catch return if (replay.out_of_descriptors) failure.set(@intFromEnum(linux.E.MFILE), out_of_descriptors, .{route.name}) else failure.set(@intFromEnum(linux.E.NOMEM), "out of memory while replaying route {s}; the log is untouched, start again with more memory", .{route.name});
            for (recovery.notes) |note| state.events.post(.warning, "log_note", .{ .route = route.name, .name = note.name, .text = note.text });
            route.applied_lsn = @max(replay.last_lsn, recovery.applied_lsn);
            route.data_lsn = route.applied_lsn;
            route.checkpoint.lsn = recovery.applied_lsn;
            route.checkpoint.last_lsn = recovery.applied_lsn;
            // Time for the clients of the daemon before to come back before their files are let go of.
            route.checkpoint.last_ns = os.monotonicNs();
            state.counters.add(.replayed_records_total, replay.records);
            state.counters.add(.replayed_bytes_total, replay.bytes);
            const incomplete = recovery.missing_records > 0;
            if (replay.records > 0 or replay.quarantined > 0 or replay.removed > 0 or incomplete) {
                state.events.post(if (incomplete) .@"error" else .info, "log_replayed", .{
                    .route = route.name,
                    .records = replay.records,
                    .bytes = replay.bytes,
                    .milliseconds = (os.monotonicNs() - replay.begun_ns) / std.time.ns_per_ms,
                    .quarantined = replay.quarantined,
                    .of_removed_files = replay.removed,
                    .missing = recovery.missing_records,
                    .receipt = recovery.receipt_name,
                });
            }
            // Files that the worker's first checkpoint will sync and, where nobody has them open, let go of.
            var known = replay.known.valueIterator();
            while (known.next()) |entry| {
                const file = entry.file orelse continue;
                engine.control.adopt(file);
                state.counters.add(.files_open, 1);
                // Also those without records: then they are let go of.
                file.unsynced_lsn = recovery.applied_lsn + 1;
                route.replayed.append(engine.allocator, file) catch
                    return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory while replaying route {s}", .{route.name});
            }
        }
    }
};

fn errnoOf(err: (log_module.OpenError || log_module.RecoverError)) i32 {
    return switch (err) {
        error.OutOfMemory, error.VisitorStopped => @intFromEnum(linux.E.NOMEM),
        error.LogVersion => @intFromEnum(linux.E.PROTO),
        error.InvalidOptions => @intFromEnum(linux.E.INVAL),
        else => |other| storage_module.errnoOf(other),
    };
}

fn spawn(failure: *Failure, comptime function: anytype, arguments: anytype) error{Failed}!std.Thread {
    return std.Thread.spawn(.{ .stack_size = 1 << 20 }, function, arguments) catch |err|
        failure.set(@intFromEnum(linux.E.AGAIN), "cannot start a thread: {s}. The limit on processes (ulimit -u, pids cgroup) is reached", .{@errorName(err)});
}

fn text(allocator: std.mem.Allocator, value: []const u8, failure: *Failure) error{Failed}![:0]u8 {
    return allocator.dupeZ(u8, value) catch failure.set(@intFromEnum(linux.E.NOMEM), "out of memory", .{});
}

/// As many descriptors as the host lets us have; file sizes are the clients' limits, not ours.
fn raiseLimits() void {
    inline for (.{ .NOFILE, .FSIZE }) |resource| {
        var limit: linux.rlimit = undefined;
        if (os.check(linux.getrlimit(resource, &limit)) == .value) {
            limit.cur = limit.max;
            _ = linux.setrlimit(resource, &limit);
        }
    }
}

fn lockSocket(path: [:0]const u8, failure: *Failure) error{Failed}!i32 {
    var name: [4096]u8 = undefined;
    const lock_path = std.fmt.bufPrintZ(&name, "{s}.lock", .{path}) catch return failure.set(@intFromEnum(linux.E.NAMETOOLONG), "the control socket's path is too long: {s}", .{path});
    const fd = try openLock(lock_path, failure);
    errdefer os.close(fd);
    switch (os.check(linux.flock(fd, os.lock_exclusive))) {
        .value => return fd,
        .errno => return failure.set(@intFromEnum(linux.E.BUSY), "another daemon serves {s} (it holds {s}). Stop that one first, or give this one its own control.socket, ring.path and wal.dir", .{ path, lock_path }),
    }
}

fn openLock(path: [:0]const u8, failure: *Failure) error{Failed}!i32 {
    return switch (os.descriptor(linux.open(path, .{ .ACCMODE = .RDWR, .CREAT = true, .CLOEXEC = true, .NOFOLLOW = true }, 0o600))) {
        .fd => |fd| fd,
        .errno => |errno| failure.set(errno, "cannot open the lock file {s}: {s}. Its directory must exist and be writable for this user", .{ path, Failure.nameOf(errno) }),
    };
}

/// The log's lock is also registered with the worker's io_uring: whoever gets it knows that no write of the
/// daemon before is still on its way.
fn lockLog(directory: []const u8, failure: *Failure) error{Failed}!i32 {
    var name: [4096]u8 = undefined;
    const path = std.fmt.bufPrintZ(&name, "{s}/lock", .{directory}) catch return failure.set(@intFromEnum(linux.E.NAMETOOLONG), "the log directory's path is too long: {s}", .{directory});
    const fd = try openLock(path, failure);
    errdefer os.close(fd);
    const deadline = os.monotonicNs() + log_lock_wait_ns;
    while (true) {
        switch (os.check(linux.flock(fd, os.lock_exclusive))) {
            .value => return fd,
            .errno => {},
        }
        if (os.monotonicNs() >= deadline) return failure.set(@intFromEnum(linux.E.BUSY), "the log directory {s} is in use: another daemon runs on it, or a killed one's writes have not landed for {d} s (a disk that hangs)", .{ directory, log_lock_wait_ns / std.time.ns_per_s });
        const pause = linux.timespec{ .sec = 0, .nsec = 5 * std.time.ns_per_ms };
        _ = linux.nanosleep(&pause, null);
    }
}

const Statfs = extern struct { kind: isize, rest: [15]usize };

fn checkLogDirectory(directory: [:0]const u8, allow_volatile: bool, failure: *Failure) error{Failed}!void {
    const made = os.check(linux.mkdir(directory, 0o700)).err();
    if (made != 0 and made != @intFromEnum(linux.E.EXIST)) return failure.set(made, "cannot create the log directory {s}: {s}. Its parent must exist and be writable for this user", .{ directory, Failure.nameOf(made) });
    const accessible = os.check(linux.faccessat(linux.AT.FDCWD, directory, linux.W_OK | linux.X_OK, 0)).err();
    if (accessible != 0) return failure.set(accessible, "cannot write to the log directory {s}: {s}. Give this user the right to, or set another wal.dir", .{ directory, Failure.nameOf(accessible) });
    placeApart(directory);
    var result: Statfs = undefined;
    const looked = os.check(linux.syscall2(.statfs, @intFromPtr(directory.ptr), @intFromPtr(&result))).err();
    if (looked != 0) return failure.set(looked, "cannot look at the file system of {s}: {s}", .{ directory, Failure.nameOf(looked) });
    const kind: ?[]const u8 = switch (result.kind) {
        0x01021994 => "tmpfs",
        0x858458f6 => "ramfs",
        0x794c7630 => "a container's overlay",
        else => null,
    };
    if (kind != null and !allow_volatile) return failure.set(@intFromEnum(linux.E.OPNOTSUPP), "the log directory {s} lies on {s}, which does not outlive a power cut. Set wal.dir to a real disk, or allow_volatile: true if you know that nothing here must survive", .{ directory, kind.? });
}

/// Tells ext4 (chattr +T) that what is made in this directory has nothing to do with what is around it, so that
/// it puts the routes' directories into block groups of their own. A file system without a journal writes the
/// whole block of the inode table with every sync that finds it dirty, and a target file whose inode lies beside
/// the segment's makes it so: a second write in each commit (docs/benchmarks.md). Elsewhere this is refused or
/// means nothing.
fn placeApart(directory: [:0]const u8) void {
    const get_flags = 0x80086601; // FS_IOC_GETFLAGS
    const set_flags = 0x40086602; // FS_IOC_SETFLAGS
    const top_directory = 0x00020000; // FS_TOPDIR_FL
    const fd = os.check(linux.open(directory, .{ .DIRECTORY = true, .CLOEXEC = true }, 0)).ok() orelse return;
    defer os.close(@intCast(fd));
    var flags: c_long = 0;
    if (os.check(linux.ioctl(@intCast(fd), get_flags, @intFromPtr(&flags))) == .errno) return;
    flags |= top_directory;
    _ = os.check(linux.ioctl(@intCast(fd), set_flags, @intFromPtr(&flags)));
}

/// null: there is nothing.
fn isSocket(path: [:0]const u8) ?bool {
    var buffer: linux.Statx = undefined;
    const looked = os.check(linux.statx(linux.AT.FDCWD, path, linux.AT.SYMLINK_NOFOLLOW, linux.STATX_TYPE, &buffer));
    return if (looked == .errno) null else buffer.mode & linux.S.IFMT == linux.S.IFSOCK;
}

fn listen(path: [:0]const u8, settings: *const Settings, failure: *Failure) error{Failed}!i32 {
    var address = linux.sockaddr.un{ .path = @splat(0) };
    if (path.len >= address.path.len) return failure.set(@intFromEnum(linux.E.NAMETOOLONG), "the control socket's path has {d} bytes, a Unix socket's can have {d}: {s}", .{ path.len, address.path.len - 1, path });
    @memcpy(address.path[0..path.len], path);
    const fd = switch (os.descriptor(linux.socket(linux.AF.UNIX, linux.SOCK.SEQPACKET | linux.SOCK.CLOEXEC | linux.SOCK.NONBLOCK, 0))) {
        .fd => |fd| fd,
        .errno => |errno| return failure.set(errno, "cannot make the control socket: {s}", .{Failure.nameOf(errno)}),
    };
    errdefer os.close(fd);
    if (isSocket(path)) |is_socket| {
        if (!is_socket) return failure.set(@intFromEnum(linux.E.EXIST), "{s} is there, and is not a socket: control.socket must name a place of its own. Set another, or move what is there away", .{path});
        // We hold the lock: it belongs to a daemon that is gone.
        _ = linux.unlink(path);
    }
    const bound = os.check(linux.bind(fd, @ptrCast(&address), @sizeOf(linux.sockaddr.un))).err();
    if (bound != 0) return failure.set(bound, "cannot bind the control socket {s}: {s}. Its directory must exist and be writable for this user", .{ path, Failure.nameOf(bound) });
    _ = linux.chmod(path, settings.control_mode);
    if (settings.control_gid >= 0) _ = linux.syscall5(.fchownat, @bitCast(@as(isize, linux.AT.FDCWD)), @intFromPtr(path.ptr), std.math.maxInt(u32), @intCast(settings.control_gid), 0);
    const listening = os.check(linux.listen(fd, 128)).err();
    if (listening != 0) return failure.set(listening, "cannot listen on {s}: {s}", .{ path, Failure.nameOf(listening) });
    return fd;
}
