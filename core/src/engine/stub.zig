//! The test stub (`runtime: {mode: test_stub}`): the same engine, for people who test their own programs. Nothing is
//! durable: the log is a file in the page cache that nobody syncs, targets are written and not synced. Each operation that
//! programs send is recorded, and faults come where a test has asked for them.
//!
//! ```
//! test process                     table (a file beside the control socket)                  daemon
//!   rules: what fails or stalls ──▶ [Header: rules, how often each was met] ──▶ worker, lanes, log storage
//!   operations                  ◀── [records, in the order of the ring]     ◀── worker, control
//! ```
//!
//! The table is shared memory: it outlives a daemon that a test kills, with the rules, their counts and all that was
//! recorded. Both sides are this one library; nobody else knows a byte of it.
//!
//! Everything that the engine does for the stub goes through the few functions of `Stub` that say who calls them.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const ring = @import("../format/ring.zig");
const routes = @import("../format/routes.zig");
const os = @import("os.zig");
const Failure = @import("failure.zig").Failure;
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;
const Control = @import("control.zig").Control;
const Worker = @import("worker.zig").Worker;
const ServedRing = @import("served_ring.zig").ServedRing;
const HandleRef = @import("served_ring.zig").HandleRef;
const Item = @import("consumer.zig").Item;
const files = @import("files.zig");
const File = files.File;
const lanes = @import("disk/lanes.zig");
const rewrite = @import("rewrite.zig");
const admission = @import("admission.zig");
const storage_module = @import("wal/storage.zig");
const Storage = storage_module.Storage;
const LinuxStorage = storage_module.LinuxStorage;

pub const rules_max = 64;
pub const pattern_bytes_max = 1024;
/// Of what is recorded, until a test says otherwise.
pub const recording_bytes_default: u64 = 64 << 20;
/// Where a target hangs, a process that has ended has its files open for as long as that.
const closing_ns_max = 500 * std.time.ns_per_ms;
/// Bound of a sleep that a wake should have ended.
const slice_ns = 10 * std.time.ns_per_ms;

pub const Kind = enum(u32) {
    /// Inside the table: a session and its process; a daemon that has started.
    session = 1,
    start = 2,
    /// A program's first operation on a file that it has open: the daemon takes it. (What is only read is never taken.)
    open = 3,
    write = 4,
    truncate = 5,
    allocate = 6,
    fsync = 7,
    close = 8,
    native = 9,
    rename = 10,
    unlink = 11,
    _,
};

/// Where a rule comes into force.
pub const Point = enum(u32) {
    /// One operation that a program sends. `write`, `truncate` and `allocate`: its target file refuses it, or hangs.
    /// `fsync`: it fails, or the worker hangs in it.
    write = 1,
    truncate = 2,
    allocate = 3,
    fsync = 4,
    /// The disk of a route's log: it takes no write, or hangs in it.
    log = 5,
    /// A route's log is full: the route takes nothing new.
    full = 6,
    /// Syncs of target files, which the daemon makes in the background.
    target_sync = 7,
    _,
};

pub const RuleState = enum(u32) { free = 0, active = 1, being_made = 2, _ };

pub const Rule = extern struct {
    state: RuleState,
    point: Point,
    /// Not 0: what is met fails with it. 0: it stalls until the rule is taken back.
    errno: i32,
    /// So many operations are let pass before the first that is met.
    skip: u32,
    /// So many are met, then the rule has no effect any more; 0: until it is taken back.
    times: u32,
    /// Operations that matched, those that were let pass too.
    matched: u32,
    /// Operations that failed or stalled. Futex.
    hits: u32,
    path_length: u32,
    route_length: u32,
    reserved: u32,
    /// Glob of files; empty: all. Not for `log` and `full`.
    path: [pattern_bytes_max]u8,
    /// Name of a route; empty: all.
    route: [routes.name_bytes_max]u8,

    fn isActive(rule: *const Rule) bool {
        return @atomicLoad(RuleState, &rule.state, .acquire) == .active;
    }

    fn isFor(rule: *const Rule, point: Point, route: []const u8, path: ?[]const u8) bool {
        if (!rule.isActive() or rule.point != point) return false;
        const wanted_route = rule.route[0..@min(rule.route_length, rule.route.len)];
        if (wanted_route.len > 0 and !std.mem.eql(u8, wanted_route, route)) return false;
        const wanted_path = rule.path[0..@min(rule.path_length, rule.path.len)];
        return wanted_path.len == 0 or routes.globMatches(wanted_path, path orelse return true);
    }

    /// One more operation matches. Whether it is one that is met.
    fn counts(rule: *Rule) bool {
        const before = @atomicRmw(u32, &rule.matched, .Add, 1, .seq_cst);
        return before >= rule.skip and (rule.times == 0 or before - rule.skip < rule.times);
    }

    fn hit(rule: *Rule) void {
        _ = @atomicRmw(u32, &rule.hits, .Add, 1, .seq_cst);
        os.futexWake(&rule.hits, std.math.maxInt(i32));
    }
};

const magic: u64 = std.mem.readInt(u64, "ELGSTUB\x00", .little);
/// Another build may draw the table differently.
const layout: u32 = @sizeOf(Header) << 8 | @sizeOf(Record);

pub const Header = extern struct {
    magic: u64,
    layout: u32,
    /// 1: a daemon serves. Stays where it is killed: see `isServed`.
    serving: u32,
    recording_bytes_max: u64,
    /// Of `Record`s, behind the header.
    recorded_bytes: u64,
    /// Operations that were not recorded, since there was no room.
    dropped: u64,
    /// The test side asks for something: the rules are to be in force, all that stands in the rings is to be recorded, and
    /// if `forget` moved, what is recorded is to be forgotten. Futex, as is the answer.
    asked: u32 align(128),
    answered: u32 align(128),
    forget: u32,
    forgotten: u32,
    /// The worker hangs in a rule.
    stalled: u32,
    /// Files and routes that fail, and will be mended by themselves.
    failing: u32,
    rules: [rules_max]Rule align(128),
    seen: [16]Seen align(128),
};

/// The operations of one ring that were counted and recorded last, by their slots: a daemon that died may have left them
/// in the ring all the same, and the next one meets them again.
pub const Seen = extern struct {
    ring: u64,
    /// Each one's position, and 1.
    positions: [ring.slot_count]u64,

    /// false: it was met before.
    fn add(seen: *Seen, ring_id: u64, position: u64) bool {
        if (seen.ring != ring_id) seen.* = .{ .ring = ring_id, .positions = @splat(0) };
        const slot = &seen.positions[ring.slotIndex(position)];
        if (slot.* == position + 1) return false;
        @atomicStore(u64, slot, position + 1, .seq_cst);
        return true;
    }
};

pub const recording_offset: u64 = std.mem.alignForward(usize, @sizeOf(Header), 4096);

/// Path, route and data follow, then zeros up to a multiple of 8.
pub const Record = extern struct {
    record_bytes: u32,
    kind: Kind,
    session: u64,
    offset: u64,
    length: u64,
    time_ns: u64,
    errno: i32,
    process_id: u32,
    thread_id: u32,
    flags: u32,
    path_length: u32,
    route_length: u32,
    data_length: u32,
    reserved: u32,
};

/// Of a write: with O_APPEND. Of an allocate: FALLOC_FL_KEEP_SIZE.
pub const flag_append: u32 = 1;

/// A rule that a file has met, and that its target is still to feel. In `File`; the worker writes it, lanes take from it.
pub const Met = struct {
    /// Runs that hold this LSN or a later one; 0: nothing.
    lsn: u64 = 0,
    rule: u32 = 0,
    /// Refusals that are left; of a rule without `times`: until it ends.
    left: u32 = 0,
};

/// The daemon's side.
pub const Stub = struct {
    state: *State,
    linux_storage: LinuxStorage,
    fd: i32,
    header: *Header,
    mutex: std.Thread.Mutex = .{},
    thread: ?std.Thread = null,
    stopping: bool = false,
    /// Of `Header.asked`: what the worker is to have in force, and what it has.
    wanted: u32 = 0,
    in_force: u32 = 0,
    worker_thread: linux.pid_t = 0,

    /// Starting thread. `path`: of the table, which is made where it is missing.
    pub fn open(allocator: std.mem.Allocator, state: *State, path: [:0]const u8, failure: *Failure) error{Failed}!*Stub {
        const stub = allocator.create(Stub) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for the test stub", .{});
        errdefer allocator.destroy(stub);
        const fd = switch (os.descriptor(linux.open(path, .{ .ACCMODE = .RDWR, .CREAT = true, .CLOEXEC = true, .NOFOLLOW = true }, 0o600))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot open the test stub's table {s}: {s}. Its directory must exist and be writable for this user", .{ path, Failure.nameOf(errno) }),
        };
        errdefer os.close(fd);
        const size = os.sizeOf(fd) orelse 0;
        if (size < recording_offset) {
            const errno = os.check(linux.fallocate(fd, 0, 0, recording_offset)).err();
            if (errno != 0) return failure.set(errno, "cannot make the test stub's table {s} of {d} bytes: {s}", .{ path, recording_offset, Failure.nameOf(errno) });
        }
        const header = mapHeader(fd) orelse return failure.set(@intFromEnum(linux.E.NOMEM), "cannot map the test stub's table {s}", .{path});
        if (header.magic != magic or header.layout != layout) {
            @memset(std.mem.asBytes(header), 0);
            header.layout = layout;
            header.recording_bytes_max = recording_bytes_default;
            header.magic = magic;
        }
        if (!lock(fd)) {
            unmapHeader(header);
            return failure.set(@intFromEnum(linux.E.BUSY), "another test stub has the table {s}", .{path});
        }
        stub.* = .{ .state = state, .linux_storage = LinuxStorage.init(.{ .no_sync = true }), .fd = fd, .header = header };
        @atomicStore(u32, &header.stalled, 0, .seq_cst);
        @atomicStore(u32, &header.failing, 0, .seq_cst);
        stub.append(.{ .kind = .start }, "", "", "");
        return stub;
    }

    /// Starting thread, once the engine serves.
    pub fn serve(stub: *Stub, control: *Control, failure: *Failure) error{Failed}!void {
        stub.thread = std.Thread.spawn(.{ .stack_size = 256 << 10 }, answer, .{ stub, control }) catch |err|
            return failure.set(@intFromEnum(linux.E.AGAIN), "cannot start a thread: {s}", .{@errorName(err)});
        @atomicStore(u32, &stub.header.serving, 1, .seq_cst);
    }

    /// Stopping thread: nobody is asked any more.
    pub fn endServing(stub: *Stub) void {
        @atomicStore(bool, &stub.stopping, true, .release);
        @atomicStore(u32, &stub.header.serving, 0, .seq_cst);
        os.futexWake(&stub.header.asked, std.math.maxInt(i32));
        if (stub.thread) |thread| thread.join();
        stub.thread = null;
    }

    pub fn close(stub: *Stub, allocator: std.mem.Allocator) void {
        unmapHeader(stub.header);
        os.close(stub.fd);
        allocator.destroy(stub);
    }

    // ---- what is asked --------------------------------------------------------------------------------

    fn answer(stub: *Stub, control: *Control) void {
        const header = stub.header;
        while (!@atomicLoad(bool, &stub.stopping, .acquire)) {
            const asked = @atomicLoad(u32, &header.asked, .seq_cst);
            if (asked == @atomicLoad(u32, &header.answered, .seq_cst)) {
                os.futexWait(&header.asked, asked, 100 * std.time.ns_per_ms);
                continue;
            }
            @atomicStore(u32, &stub.wanted, asked, .seq_cst);
            stub.settle(control, asked);
            const forget = @atomicLoad(u32, &header.forget, .seq_cst);
            if (forget != header.forgotten) {
                stub.mutex.lock();
                defer stub.mutex.unlock();
                forgetAll(header, forget);
            }
            @atomicStore(u32, &header.answered, asked, .seq_cst);
            os.futexWake(&header.answered, std.math.maxInt(i32));
        }
    }

    /// Returns when the rules are in force, and what the rings held is recorded; or when the worker hangs in a rule.
    fn settle(stub: *Stub, control: *Control, asked: u32) void {
        const closing_deadline_ns = os.monotonicNs() + closing_ns_max;
        var heads: [@import("served_ring.zig").rings_max]u64 = @splat(0);
        {
            control.mutex.lock();
            defer control.mutex.unlock();
            for (control.rings, &heads) |each, *head| if (each) |served| {
                head.* = served.headPosition();
            };
        }
        while (!@atomicLoad(bool, &stub.stopping, .acquire) and @atomicLoad(u32, &stub.header.stalled, .seq_cst) == 0) {
            stub.state.wakeWorker();
            const in_force = @atomicLoad(u32, &stub.in_force, .seq_cst) == asked;
            if (in_force and hasLookedUpTo(control, &heads) and (isClosed(control) or os.monotonicNs() >= closing_deadline_ns)) return;
            os.futexWait(&stub.in_force, @atomicLoad(u32, &stub.in_force, .seq_cst), std.time.ns_per_ms / 4);
        }
    }

    fn hasLookedUpTo(control: *Control, heads: []const u64) bool {
        control.mutex.lock();
        defer control.mutex.unlock();
        for (control.rings, heads) |each, head| {
            const served = each orelse continue;
            if (served.leaving or served.lost) continue;
            if (@atomicLoad(u64, &served.publisher.header().scanned, .acquire) < head) return false;
        }
        return true;
    }

    /// Processes that have ended have no file open any more.
    fn isClosed(control: *Control) bool {
        control.mutex.lock();
        defer control.mutex.unlock();
        var sessions = control.sessions_by_id.valueIterator();
        while (sessions.next()) |entry| {
            const session = entry.*;
            if (session.closed) return false;
            var polled = [1]linux.pollfd{.{ .fd = session.fd, .events = 0, .revents = 0 }};
            if (linux.poll(&polled, 1, 0) == 1) return false; // it has hung up
        }
        return true;
    }

    /// Worker, at the end of each round. true: another one is to follow at once.
    pub fn afterRound(stub: *Stub, worker: *Worker) bool {
        const header = stub.header;
        if (stub.worker_thread == 0) stub.worker_thread = linux.gettid();
        var failing: u32 = worker.failed_files;
        for (0..stub.state.routeCount()) |index| {
            if (stub.state.route(@intCast(index)).failed_errno != 0) failing += 1;
        }
        if (header.failing != failing) @atomicStore(u32, &header.failing, failing, .seq_cst);
        const wanted = @atomicLoad(u32, &stub.wanted, .seq_cst);
        if (wanted == stub.in_force) return false;
        for (0..stub.state.routeCount()) |index| {
            const route = stub.state.route(@intCast(index));
            admission.update(stub.state, worker.served(), route, worker.mayFill(route));
            // Until it is open again.
            if (route.admission != .open) worker.activate(route);
            route.failed_at_ns = 0;
        }
        // What failed by a rule that was taken back is mended at once.
        for (worker.known_files.items) |file| {
            const is_over = file.met.lsn != 0 and !header.rules[file.met.rule].isActive();
            if (is_over) @atomicStore(u64, &file.met.lsn, 0, .release);
            file.rewrite_at_ns = 0;
            file.rewrite_pause_ns = @min(file.rewrite_pause_ns, 100 * std.time.ns_per_ms);
        }
        worker.last_tick_ns = 0;
        @atomicStore(u32, &stub.in_force, wanted, .seq_cst);
        os.futexWake(&stub.in_force, std.math.maxInt(i32));
        return true;
    }

    // ---- rules ----------------------------------------------------------------------------------------

    /// The rule that an operation meets, by its number: of several the first.
    fn meet(stub: *Stub, point: Point, file: *const File, path: []const u8) ?u32 {
        const route = stub.state.route(file.route);
        var met: ?u32 = null;
        for (&stub.header.rules, 0..) |*rule, index| {
            if (rule.isFor(point, route.name, path) and rule.counts() and met == null) met = @intCast(index);
        }
        if (met) |index| stub.header.rules[index].hit();
        return met;
    }

    /// Worker (see admission.zig).
    pub fn isFull(stub: *Stub, route: *const Route) bool {
        for (&stub.header.rules) |*rule| {
            if (rule.isFor(.full, route.name, null)) return true;
        }
        return false;
    }

    /// Any thread: until the rule is taken back, or the daemon ends.
    fn stall(stub: *Stub, rule: *Rule) void {
        while (rule.isActive() and !@atomicLoad(bool, &stub.state.stopping, .acquire)) {
            os.futexWait(@ptrCast(&rule.state), @intFromEnum(RuleState.active), slice_ns);
        }
    }

    fn stallWorker(stub: *Stub, rule: *Rule) void {
        @atomicStore(u32, &stub.header.stalled, 1, .seq_cst);
        stub.stall(rule);
        @atomicStore(u32, &stub.header.stalled, 0, .seq_cst);
    }

    // ---- operations -----------------------------------------------------------------------------------

    /// Worker: an operation is in its group.
    pub fn taken(stub: *Stub, from: *const ServedRing, item: *const Item, file: *File, offset: u64, length: u64, lsn: u64, payload: []const u8) void {
        if (!stub.isNew(from, item)) return;
        const operation: ring.Operation = @enumFromInt(item.header.operation);
        const kind: Kind, const point: Point = switch (operation) {
            .write, .append => .{ .write, .write },
            .truncate => .{ .truncate, .truncate },
            .allocate => .{ .allocate, .allocate },
            else => unreachable,
        };
        var buffer: [4096]u8 = undefined;
        const path = pathOf(file, &buffer);
        var errno: i32 = 0;
        if (stub.meet(point, file, path)) |index| {
            errno = stub.header.rules[index].errno;
            const met = &file.met;
            _ = @atomicRmw(u32, &met.left, .Add, 1, .seq_cst);
            if (@atomicLoad(u64, &met.lsn, .acquire) == 0) {
                met.rule = index;
                @atomicStore(u64, &met.lsn, lsn, .release);
            }
        }
        stub.recordItem(kind, from, item, file, offset, length, errno, path, if (operation == .write or operation == .append) payload else "");
    }

    /// Worker: a barrier that a program waits for, and that makes its file durable.
    pub fn synced(stub: *Stub, from: *const ServedRing, item: *const Item, file: *File) void {
        if (item.header.argument == ring.barrier_look or !stub.isNew(from, item)) return;
        var buffer: [4096]u8 = undefined;
        const path = pathOf(file, &buffer);
        const met = stub.meet(.fsync, file, path);
        const errno = if (met) |index| stub.header.rules[index].errno else 0;
        stub.recordItem(.fsync, from, item, file, 0, 0, errno, path, "");
        if (errno != 0) return Worker.reportFileError(file, errno);
        if (met) |index| stub.stallWorker(&stub.header.rules[index]);
    }

    fn isNew(stub: *Stub, from: *const ServedRing, item: *const Item) bool {
        const id = ringId(from);
        return stub.header.seen[id % stub.header.seen.len].add(id, item.position);
    }

    fn ringId(from: *const ServedRing) u64 {
        return std.mem.readInt(u64, from.uuid[0..8], .little) | 1;
    }

    fn recordItem(stub: *Stub, kind: Kind, from: *const ServedRing, item: *const Item, file: *const File, offset: u64, length: u64, errno: i32, path: []const u8, data: []const u8) void {
        const operation: ring.Operation = @enumFromInt(item.header.operation);
        stub.append(.{
            .kind = kind,
            .session = @constCast(from).sessionOfRow(item.owner),
            .offset = offset,
            .length = length,
            .time_ns = if (operation == .allocate) 0 else item.header.time_ns,
            .errno = errno,
            .thread_id = from.view.producerRow(item.owner).thread_id,
            .flags = if (operation == .append) flag_append else if (operation == .allocate) item.header.argument else 0,
        }, path, stub.state.route(file.route).name, data);
    }

    /// Control: a session begins. What it sends is of this process.
    pub fn sessionOpened(stub: *Stub, session: u64, process_id: i32) void {
        stub.append(.{ .kind = .session, .session = session, .process_id = @intCast(@max(process_id, 0)) }, "", "", "");
    }

    /// Control: something other than an operation in the ring. `argument`: of `native`, why.
    pub fn happened(stub: *Stub, kind: Kind, session: u64, file: *const File, argument: u32, errno: i32, new_path: []const u8) void {
        var buffer: [4096]u8 = undefined;
        const path = pathOf(file, &buffer);
        stub.append(.{ .kind = kind, .session = session, .flags = argument, .errno = errno, .time_ns = os.monotonicNs() }, path, stub.state.route(file.route).name, new_path);
    }

    fn pathOf(file: *const File, buffer: *[4096]u8) []const u8 {
        return os.pathOf(file.fd, buffer) orelse file.identity.pathText();
    }

    const Described = struct {
        kind: Kind,
        session: u64 = 0,
        offset: u64 = 0,
        length: u64 = 0,
        time_ns: u64 = 0,
        errno: i32 = 0,
        process_id: u32 = 0,
        thread_id: u32 = 0,
        flags: u32 = 0,
    };

    fn append(stub: *Stub, described: Described, path: []const u8, route: []const u8, data: []const u8) void {
        const header = stub.header;
        const used = @sizeOf(Record) + path.len + route.len + data.len;
        const record_bytes = std.mem.alignForward(usize, used, 8);
        const record = Record{
            .record_bytes = @intCast(record_bytes),
            .kind = described.kind,
            .session = described.session,
            .offset = described.offset,
            .length = described.length,
            .time_ns = described.time_ns,
            .errno = described.errno,
            .process_id = described.process_id,
            .thread_id = described.thread_id,
            .flags = described.flags,
            .path_length = @intCast(path.len),
            .route_length = @intCast(route.len),
            .data_length = @intCast(data.len),
            .reserved = 0,
        };
        const padding: [8]u8 = @splat(0);
        const parts = [_][]const u8{ std.mem.asBytes(&record), path, route, data, padding[0 .. record_bytes - used] };
        var vectors: [parts.len]std.posix.iovec_const = undefined;
        for (parts, &vectors) |part, *vector| vector.* = .{ .base = part.ptr, .len = part.len };
        stub.mutex.lock();
        defer stub.mutex.unlock();
        const at = header.recorded_bytes;
        // Never more behind a gap: what is there is a beginning.
        const fits = header.dropped == 0 and record_bytes <= header.recording_bytes_max -| at;
        const written = if (fits) os.check(linux.pwritev(stub.fd, &vectors, vectors.len, @intCast(recording_offset + at))).ok() orelse 0 else 0;
        if (written != record_bytes) {
            _ = @atomicRmw(u64, &header.dropped, .Add, 1, .seq_cst);
            return;
        }
        @atomicStore(u64, &header.recorded_bytes, at + record_bytes, .release);
    }

    // ---- targets --------------------------------------------------------------------------------------

    fn of(file: *const File) *Stub {
        return @ptrCast(@alignCast(file.log.storage.context));
    }

    /// Lanes: what a rule says of what the file is about to get up to `last_lsn`. null: nothing stands against it.
    fn verdict(stub: *Stub, file: *File, last_lsn: u64) ?i32 {
        const met = &file.met;
        const lsn = @atomicLoad(u64, &met.lsn, .acquire);
        if (lsn == 0 or last_lsn < lsn) return null;
        const rule = &stub.header.rules[met.rule];
        if (rule.errno == 0) {
            stub.stall(rule);
        } else if (rule.isActive()) {
            if (rule.times == 0) return rule.errno;
            if (@atomicLoad(u32, &met.left, .seq_cst) > 0) {
                _ = @atomicRmw(u32, &met.left, .Sub, 1, .seq_cst);
                return rule.errno;
            }
        }
        @atomicStore(u32, &met.left, 0, .seq_cst);
        @atomicStore(u64, &met.lsn, 0, .release);
        return null;
    }

    fn syncVerdict(stub: *Stub, file: *const File) i32 {
        var buffer: [4096]u8 = undefined;
        const index = stub.meet(.target_sync, file, pathOf(file, &buffer)) orelse return 0;
        const rule = &stub.header.rules[index];
        if (rule.errno == 0) stub.stall(rule);
        return rule.errno;
    }

    /// Of the lanes that write.
    pub fn performRun(file: *File) i32 {
        const stub = of(file);
        if (file.queue.first.?.kind == .sync) return -stub.syncVerdict(file);
        if (stub.verdict(file, file.queue.given.?.last_lsn)) |errno| return -errno;
        return lanes.performRun(file);
    }

    /// Of the lanes for what takes longer: nothing is synced, and no page dropped.
    pub fn performErrand(file: *File) i32 {
        const stub = of(file);
        switch (file.errand) {
            .sync, .release => {
                file.name_synced = file.naming.former.len > 0;
                return -stub.syncVerdict(file);
            },
            .rewrite => {
                if (stub.verdict(file, std.math.maxInt(u64))) |errno| return -errno;
                if (file.pages_suspect) {
                    const errno = stub.syncVerdict(file);
                    if (errno != 0) return -errno;
                }
                return -rewrite.rewrite(file, .left_out);
            },
        }
    }

    // ---- the log --------------------------------------------------------------------------------------

    /// The real one, without syncs, and with what rules say. Its context is the stub: see `of`.
    pub fn storage(stub: *Stub) Storage {
        return .{ .context = stub, .vtable = &storage_vtable };
    }

    const inner = LinuxStorage.vtable;

    const storage_vtable = vtable: {
        var made: Storage.VTable = undefined;
        for (std.meta.fieldNames(Storage.VTable)) |name| @field(made, name) = forwarded(name);
        made.supportsDirect = neverDirect;
        made.write = writeToLog;
        made.sync = syncLog;
        break :vtable made;
    };

    /// The same function of the real storage, which has another context.
    fn forwarded(comptime name: []const u8) @FieldType(Storage.VTable, name) {
        const function = @field(inner, name);
        const parameters = @typeInfo(std.meta.Child(@TypeOf(function))).@"fn".params;
        const Return = @typeInfo(std.meta.Child(@TypeOf(function))).@"fn".return_type.?;
        return switch (parameters.len) {
            1 => struct {
                fn call(c: *anyopaque) Return {
                    return function(realOf(c));
                }
            }.call,
            2 => struct {
                fn call(c: *anyopaque, a: parameters[1].type.?) Return {
                    return function(realOf(c), a);
                }
            }.call,
            3 => struct {
                fn call(c: *anyopaque, a: parameters[1].type.?, b: parameters[2].type.?) Return {
                    return function(realOf(c), a, b);
                }
            }.call,
            4 => struct {
                fn call(c: *anyopaque, a: parameters[1].type.?, b: parameters[2].type.?, d: parameters[3].type.?) Return {
                    return function(realOf(c), a, b, d);
                }
            }.call,
            5 => struct {
                fn call(c: *anyopaque, a: parameters[1].type.?, b: parameters[2].type.?, d: parameters[3].type.?, e: parameters[4].type.?) Return {
                    return function(realOf(c), a, b, d, e);
                }
            }.call,
            else => comptime unreachable,
        };
    }

    fn realOf(context: *anyopaque) *anyopaque {
        const stub: *Stub = @ptrCast(@alignCast(context));
        return &stub.linux_storage;
    }

    fn neverDirect(_: *anyopaque, _: storage_module.Directory) bool {
        return false;
    }

    fn writeToLog(context: *anyopaque, file: storage_module.File, vectors: []const []const u8, offset: u64, durable: bool) storage_module.Error!void {
        try logVerdict(context, file);
        return inner.write(realOf(context), file, vectors, offset, durable);
    }

    fn syncLog(context: *anyopaque, file: storage_module.File) storage_module.Error!void {
        try logVerdict(context, file);
        return inner.sync(realOf(context), file);
    }

    fn logVerdict(context: *anyopaque, file: storage_module.File) storage_module.Error!void {
        const stub: *Stub = @ptrCast(@alignCast(context));
        for (&stub.header.rules) |*rule| {
            if (!rule.isActive() or rule.point != .log) continue;
            var buffer: [4096]u8 = undefined;
            const path = os.pathOf(@intFromEnum(file), &buffer) orelse continue;
            const route = std.fs.path.basename(std.fs.path.dirname(path) orelse continue);
            if (!rule.isFor(.log, route, null)) continue;
            rule.hit();
            if (rule.errno != 0) return storage_module.errorOf(rule.errno);
            // On whichever thread it is.
            if (linux.gettid() == stub.worker_thread) stub.stallWorker(rule) else stub.stall(rule);
        }
    }
};

// ---- the test's side --------------------------------------------------------------------------------------

pub const Table = struct {
    fd: i32,
    header: *Header,

    /// errno.
    pub fn open(path: [*:0]const u8) union(enum) { table: Table, errno: i32 } {
        const fd = switch (os.descriptor(linux.open(path, .{ .ACCMODE = .RDWR, .CLOEXEC = true, .NOFOLLOW = true }, 0))) {
            .fd => |fd| fd,
            .errno => |errno| return .{ .errno = errno },
        };
        if ((os.sizeOf(fd) orelse 0) < recording_offset) {
            os.close(fd);
            return .{ .errno = @intFromEnum(linux.E.PROTO) };
        }
        const header = mapHeader(fd) orelse {
            os.close(fd);
            return .{ .errno = @intFromEnum(linux.E.NOMEM) };
        };
        if (header.magic != magic or header.layout != layout) {
            unmapHeader(header);
            os.close(fd);
            return .{ .errno = @intFromEnum(linux.E.PROTO) };
        }
        return .{ .table = .{ .fd = fd, .header = header } };
    }

    pub fn close(table: *const Table) void {
        unmapHeader(table.header);
        os.close(table.fd);
    }

    pub fn isServed(table: *const Table) bool {
        return @atomicLoad(u32, &table.header.serving, .seq_cst) != 0 and isLocked(table.fd);
    }

    /// See `Header.asked`. Errno: ESRCH where no daemon serves, ETIMEDOUT.
    pub fn settle(table: *const Table, timeout_ns: u64) i32 {
        const header = table.header;
        const wanted = @atomicRmw(u32, &header.asked, .Add, 1, .seq_cst) +% 1;
        os.futexWake(&header.asked, std.math.maxInt(i32));
        const deadline_ns = os.monotonicNs() +| timeout_ns;
        while (true) {
            const answered = @atomicLoad(u32, &header.answered, .seq_cst);
            if (@as(i32, @bitCast(answered -% wanted)) >= 0) return 0;
            if (!table.isServed()) return @intFromEnum(linux.E.SRCH);
            const now_ns = os.monotonicNs();
            if (now_ns >= deadline_ns) return @intFromEnum(linux.E.TIMEDOUT);
            os.futexWait(&header.answered, answered, @min(deadline_ns - now_ns, slice_ns));
        }
    }

    /// Forgets what is recorded; in force with the next `settle`, or at once where no daemon serves.
    pub fn forget(table: *const Table) void {
        const wanted = @atomicRmw(u32, &table.header.forget, .Add, 1, .seq_cst) +% 1;
        if (!table.isServed()) forgetAll(table.header, wanted);
    }

    /// The rule's number; null: there are too many. In force with the next `settle`.
    pub fn addRule(table: *const Table, rule: *const Rule) ?u32 {
        for (&table.header.rules, 0..) |*slot, index| {
            if (@cmpxchgStrong(RuleState, &slot.state, .free, .being_made, .seq_cst, .monotonic) != null) continue;
            var made = rule.*;
            made.state = .being_made;
            made.matched = 0;
            made.hits = 0;
            slot.* = made;
            @atomicStore(RuleState, &slot.state, .active, .seq_cst);
            return @intCast(index);
        }
        return null;
    }

    pub fn removeRule(table: *const Table, index: u32) void {
        const rule = &table.header.rules[index];
        @atomicStore(RuleState, &rule.state, .free, .seq_cst);
        os.futexWake(@ptrCast(&rule.state), std.math.maxInt(i32));
    }

    /// Until a rule has had an effect `hits` times. Errno, as `settle`.
    pub fn awaitHits(table: *const Table, index: u32, hits: u32, timeout_ns: u64) i32 {
        const rule = &table.header.rules[index];
        const deadline_ns = os.monotonicNs() +| timeout_ns;
        while (true) {
            const seen = @atomicLoad(u32, &rule.hits, .seq_cst);
            if (seen >= hits) return 0;
            if (!table.isServed()) return @intFromEnum(linux.E.SRCH);
            const now_ns = os.monotonicNs();
            if (now_ns >= deadline_ns) return @intFromEnum(linux.E.TIMEDOUT);
            os.futexWait(&rule.hits, seen, @min(deadline_ns - now_ns, slice_ns));
        }
    }

    /// Into `buffer`, which must have room for all of it. 0: there is no more; else its length; -errno.
    pub fn read(table: *const Table, at: u64, buffer: []align(8) u8) i64 {
        const end = @atomicLoad(u64, &table.header.recorded_bytes, .acquire);
        if (at >= end) return 0;
        var record: Record = undefined;
        const head = os.check(linux.pread(table.fd, std.mem.asBytes(&record), @sizeOf(Record), @intCast(recording_offset + at)));
        if (head != .value or head.value != @sizeOf(Record) or record.record_bytes < @sizeOf(Record)) return -@as(i64, @intFromEnum(linux.E.PROTO));
        if (record.record_bytes > buffer.len) return -@as(i64, @intFromEnum(linux.E.NOBUFS));
        const body = os.check(linux.pread(table.fd, buffer.ptr, record.record_bytes, @intCast(recording_offset + at)));
        if (body != .value or body.value != record.record_bytes) return -@as(i64, @intFromEnum(linux.E.PROTO));
        return record.record_bytes;
    }
};

fn forgetAll(header: *Header, wanted: u32) void {
    @atomicStore(u64, &header.recorded_bytes, 0, .seq_cst);
    @atomicStore(u64, &header.dropped, 0, .seq_cst);
    @atomicStore(u32, &header.forgotten, wanted, .seq_cst);
}

fn mapHeader(fd: i32) ?*Header {
    const mapped = os.check(linux.mmap(null, recording_offset, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, fd, 0));
    return @ptrFromInt(mapped.ok() orelse return null);
}

fn unmapHeader(header: *Header) void {
    _ = linux.munmap(@ptrCast(@alignCast(header)), recording_offset);
}

// The daemon's lock on the table goes with the daemon, by whatever way that ends, and can be seen without taking it.

const Flock = extern struct { kind: i16, whence: i16 = 0, start: i64 = 0, length: i64 = 0, process_id: i32 = 0 };
const ofd_getlk = 36;
const ofd_setlk = 37;
const lock_write = 1;
const lock_none = 2;

fn lock(fd: i32) bool {
    var wanted = Flock{ .kind = lock_write };
    return os.check(linux.fcntl(fd, ofd_setlk, @intFromPtr(&wanted))) == .value;
}

fn isLocked(fd: i32) bool {
    var wanted = Flock{ .kind = lock_write };
    return os.check(linux.fcntl(fd, ofd_getlk, @intFromPtr(&wanted))) == .value and wanted.kind != lock_none;
}

comptime {
    assert(@sizeOf(Record) % 8 == 0);
    assert(@sizeOf(RuleState) == 4);
}
