//! After any restart: what stands in the log above the checkpoint is applied again, in order, to the very
//! inodes that it was meant for. "In the page cache" is never evidence that it is in the file.
//!
//! Nothing is checkpointed here: what the ring still holds names files by the identities in this window of the
//! log, so the window stays until the worker has taken the ring's rest over and checkpoints as always.

const std = @import("std");
const linux = std.os.linux;
const wal = @import("../format/wal.zig");
const os = @import("os.zig");
const files = @import("files.zig");
const File = files.File;
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;
const Recovered = @import("worker.zig").Recovered;
const log_module = @import("wal/log.zig");
const quarantine = @import("quarantine.zig");
const routes = @import("../format/routes.zig");
const rewrite = @import("rewrite.zig");

/// What one file's records in the log add up to.
const Known = struct {
    identity: ?*files.Identity = null,
    identity_lsn: u64 = 0,
    /// Other paths that it may have, the newest last. Owned.
    others: std.ArrayListUnmanaged([]const u8) = .empty,
    /// All that is behind this is for a file that was opened again; without an identity behind it there is nothing.
    released_lsn: u64 = 0,
    /// It was losing its last name: where it is not found, nothing of it is missed.
    removed: bool = false,
    /// Nothing at or below is replayed.
    fence_lsn: u64 = 0,
    /// Of what is.
    cuts: rewrite.Cuts = .{},
    file: ?*File = null,
    /// Looked for and not found: its records go to the quarantine.
    lost: bool = false,
    reported: bool = false,
    /// Something has been applied to it.
    written: bool = false,

    fn fence(known: *Known, lsn: u64) void {
        known.fence_lsn = lsn;
        known.cuts.clear();
    }

    fn addPath(known: *Known, allocator: std.mem.Allocator, path: []const u8) !void {
        for (known.others.items) |other| if (std.mem.eql(u8, other, path)) return;
        // Of so many names in a row the first and the last ones are the likeliest.
        if (known.others.items.len == others_max) allocator.free(known.others.orderedRemove(others_max / 2));
        const kept = try allocator.dupe(u8, path);
        errdefer allocator.free(kept);
        try known.others.append(allocator, kept);
    }
};

const others_max = 64;

pub const Progress = *const fn (route: [*:0]const u8, done_bytes: u64, total_bytes: u64) callconv(.c) void;

const silent_ns = 2 * std.time.ns_per_s;
const tell_every_ns = std.time.ns_per_s;

/// Writes that follow one another in one file, gathered: many small records cost one system call.
const Run = struct {
    file: ?*File = null,
    offset: u64 = 0,
    length: usize = 0,
    first_lsn: u64 = 0,
    records: u64 = 0,
};
pub const run_bytes_max = 256 * 1024;

pub const Replay = struct {
    state: *State,
    route: *Route,
    recovered: *Recovered,
    known: std.AutoHashMapUnmanaged(u64, Known) = .empty,
    records: u64 = 0,
    bytes: u64 = 0,
    quarantined: u64 = 0,
    /// Of files that were removed.
    removed: u64 = 0,
    last_lsn: u64 = 0,
    /// Why it stopped, if it did and there was memory.
    out_of_descriptors: bool = false,
    /// Hears how far it is, about once a second, once it takes long.
    tell: ?Progress,
    begun_ns: u64,
    told_ns: u64 = 0,
    run: Run = .{},
    run_memory: []u8,

    pub fn deinit(replay: *Replay) void {
        var entries = replay.known.valueIterator();
        while (entries.next()) |known| {
            if (known.identity) |identity| replay.state.allocator.destroy(identity);
            for (known.others.items) |path| replay.state.allocator.free(path);
            known.others.deinit(replay.state.allocator);
            known.cuts.deinit(replay.state.allocator);
        }
        replay.known.deinit(replay.state.allocator);
    }

    pub fn visitor(replay: *Replay) log_module.Visitor {
        return .{ .context = replay, .visit = visit, .progress = progress };
    }

    fn progress(context: *anyopaque, done_bytes: u64, total_bytes: u64) void {
        const replay: *Replay = @ptrCast(@alignCast(context));
        const tell = replay.tell orelse return;
        const now_ns = os.monotonicNs();
        if (now_ns - replay.begun_ns < silent_ns or now_ns - replay.told_ns < tell_every_ns) return;
        replay.told_ns = now_ns;
        var name: [routes.name_bytes_max + 1]u8 = undefined;
        const route = std.fmt.bufPrintZ(&name, "{s}", .{replay.route.name}) catch return;
        tell(route, done_bytes, total_bytes);
    }

    fn visit(context: *anyopaque, pass: log_module.Pass, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void {
        const replay: *Replay = @ptrCast(@alignCast(context));
        const done = switch (pass) {
            .survey => replay.survey(header, payload),
            .apply => replay.apply(header, payload),
        };
        done catch return error.VisitorStopped; // out of memory, or of descriptors: nothing else stops a replay
    }

    fn entry(replay: *Replay, file_id: u64) !*Known {
        const result = try replay.known.getOrPut(replay.state.allocator, file_id);
        if (!result.found_existing) result.value_ptr.* = .{};
        return result.value_ptr;
    }

    /// First pass: who the files are, where their fences stand, which of the ring's operations are in the log.
    fn survey(replay: *Replay, header: *const wal.RecordHeader, payload: []const u8) !void {
        const allocator = replay.state.allocator;
        replay.last_lsn = header.lsn;
        if (!std.mem.allEqual(u8, &header.ring_uuid, 0)) try replay.recovered.noteLogged(allocator, header.ring_uuid, header.position);
        switch (@as(wal.Kind, @enumFromInt(header.kind))) {
            .identity => {
                const identity = files.Identity.parse(payload) orelse return;
                const known = try replay.entry(header.file_id);
                if (known.identity) |before| {
                    if (!std.mem.eql(u8, before.pathText(), identity.pathText())) try known.addPath(allocator, before.pathText());
                } else known.identity = try allocator.create(files.Identity);
                known.identity.?.* = identity;
                known.identity_lsn = header.lsn;
                known.removed = false;
            },
            .fence => (try replay.entry(header.file_id)).fence(header.lsn),
            .released => {
                const known = try replay.entry(header.file_id);
                known.fence(header.lsn);
                known.released_lsn = header.lsn;
            },
            .truncate => try (try replay.entry(header.file_id)).cuts.add(allocator, header.lsn, header.offset),
            .rename => {
                if (payload.len == 0 or payload.len >= 4096 or payload[0] != '/' or std.mem.indexOfScalar(u8, payload, 0) != null) return;
                const known = try replay.entry(header.file_id);
                try known.addPath(allocator, payload);
                known.removed = false;
            },
            .removed => (try replay.entry(header.file_id)).removed = true,
            else => {},
        }
    }

    /// Second pass: into the files.
    fn apply(replay: *Replay, header: *const wal.RecordHeader, payload: []const u8) !void {
        const kind: wal.Kind = @enumFromInt(header.kind);
        switch (kind) {
            .write, .truncate, .allocate => {},
            else => return,
        }
        const known = try replay.entry(header.file_id);
        if (header.lsn <= known.fence_lsn) return;
        const file = try replay.locate(header.file_id, known) orelse {
            if (!known.removed) try replay.recovered.lost.put(replay.state.allocator, header.file_id, {});
            return replay.setAside(known, header, payload);
        };
        // Where the file ends once all is in it, whatever of it can be written now.
        file.end = switch (kind) {
            .truncate => header.offset,
            .write => @max(file.end, header.offset + payload.len),
            else => file.end,
        };
        file.last_lsn = header.lsn;
        if (file.failed_errno != 0) return; // in order, or not at all
        if (!known.written) {
            known.written = true;
            const cut = known.cuts.begin(file.fd);
            if (cut != 0) return replay.noteApplied(file, cut, header.lsn, 1, payload.len);
            // The daemon before may have been killed while a sync of its was failing.
            const dropped = files.dropPages(file.sync_fd, .what_can_go);
            file.pages_suspect = dropped != 0;
            if (dropped != 0) return replay.noteApplied(file, dropped, header.lsn, 1, payload.len);
        }
        const length_max = known.cuts.lengthMax(header.lsn);
        if (kind == .write and payload.len <= run_bytes_max) return replay.gather(file, header, payload[0..@min(payload.len, length_max -| header.offset)]);
        replay.flush();
        if (file.failed_errno != 0) return;
        replay.noteApplied(file, rewrite.apply(file.fd, header, payload, length_max), header.lsn, 1, payload.len);
    }

    /// In order: what is gathered goes out before anything that does not follow it.
    fn gather(replay: *Replay, file: *File, header: *const wal.RecordHeader, payload: []const u8) void {
        if (payload.len == 0) return; // all of it is cut off
        const run = &replay.run;
        const follows = run.file == file and run.offset + run.length == header.offset and
            run.length + payload.len <= replay.run_memory.len;
        if (!follows) {
            replay.flush();
            if (file.failed_errno != 0) return;
            run.* = .{ .file = file, .offset = header.offset, .first_lsn = header.lsn };
        }
        @memcpy(replay.run_memory[run.length..][0..payload.len], payload);
        run.length += payload.len;
        run.records += 1;
    }

    /// Writes what is gathered.
    fn flush(replay: *Replay) void {
        const run = replay.run;
        const file = run.file orelse return;
        replay.run = .{};
        const errno = rewrite.writeAll(file.fd, replay.run_memory[0..run.length], run.offset);
        replay.noteApplied(file, errno, run.first_lsn, run.records, run.length);
    }

    fn noteApplied(replay: *Replay, file: *File, errno: i32, first_lsn: u64, records: u64, bytes: u64) void {
        if (errno != 0) {
            // Nothing may be appended where what is missing belongs: it takes nothing until that is there.
            file.failed_errno = errno;
            file.rewrite_lsn = first_lsn;
            replay.state.events.post(.@"error", "replay_write_failed", .{ .route = replay.route.name, .path = file.identity.pathText(), .lsn = first_lsn, .errno = errno });
            return;
        }
        replay.records += records;
        replay.bytes += bytes;
    }

    /// The file as it can be opened now; null where it is gone.
    fn locate(replay: *Replay, file_id: u64, known: *Known) !?*File {
        if (known.file) |file| return file;
        if (known.lost) return null;
        known.lost = true;
        const identity = known.identity orelse return null;
        const fd = files.find(identity, known.others.items, replay.route.log.uuid, file_id) catch |err| {
            replay.out_of_descriptors = true;
            return err;
        } orelse {
            if (known.removed) try replay.recovered.removed.put(replay.state.allocator, file_id, {});
            return null;
        };
        errdefer os.close(fd);
        const allocator = replay.state.allocator;
        const file = try allocator.create(File);
        errdefer allocator.destroy(file);
        const sync_fd = files.openForSync(fd);
        errdefer if (sync_fd != fd) os.close(sync_fd);
        file.* = .{ .file_id = file_id, .route = replay.route.index, .log = replay.route.log, .identity = identity.*, .fd = fd, .sync_fd = sync_fd, .identity_lsn = known.identity_lsn, .last_lsn = known.identity_lsn, .fence_lsn = known.fence_lsn };
        // The device's number may have changed with a reboot, the path with a rename.
        if (os.statOf(fd) == .stat) file.identity.blob.device = os.statOf(fd).stat.device;
        var path: [4096]u8 = undefined;
        if (os.pathOf(fd, &path)) |now| {
            @memcpy(file.identity.path[0..now.len], now);
            file.identity.blob.path_length = @intCast(now.len);
        }
        if (os.sizeOf(fd)) |size| {
            file.end = size;
            file.end_known = true;
        }
        try replay.recovered.files.put(allocator, file_id, file);
        known.file = file;
        known.lost = false;
        return file;
    }

    /// Opens every file that the log names, also those without records: the ring may still hold some for them,
    /// and their mark must be taken off in the end.
    /// After the recovery. All that was gathered is written then.
    pub fn locateAll(replay: *Replay) !void {
        replay.flush();
        var entries = replay.known.iterator();
        while (entries.next()) |pair| {
            const known = pair.value_ptr;
            if (known.released_lsn > known.identity_lsn) try replay.unmark(pair.key_ptr.*, known) else _ = try replay.locate(pair.key_ptr.*, known);
        }
    }

    /// The daemon before may not have come to it, or it has not outlived a power cut.
    fn unmark(replay: *Replay, file_id: u64, known: *const Known) !void {
        const identity = known.identity orelse return;
        const found = files.findNear(identity, known.others.items, replay.route.log.uuid, file_id) catch |err| {
            replay.out_of_descriptors = true;
            return err;
        };
        const fd = found orelse return;
        files.unmark(fd);
        os.close(fd);
    }

    fn setAside(replay: *Replay, known: *Known, header: *const wal.RecordHeader, payload: []const u8) void {
        if (known.removed) {
            replay.removed += 1;
            return;
        }
        replay.quarantined += 1;
        const path = if (known.identity) |identity| identity.pathText() else "?";
        const reason = if (known.identity == null) "the log does not say which file it is for" else "its file is not there any more";
        quarantine.add(replay.state, replay.route, std.mem.asBytes(header), payload, .{
            .file_id = header.file_id,
            .path = path,
            .reason = reason,
            .silent = known.reported, // once per file
        });
        known.reported = true;
    }
};
