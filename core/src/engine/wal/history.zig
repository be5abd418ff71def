//! Segments that the checkpoint has passed, kept for people to look at, for as long as `wal.max_age` says and
//! `wal.max_size` has room for them: in `history/` below the log's directory. To the log they are gone. A start does
//! not read them, no replay sees them, and whatever is wrong with them is nobody's loss; so what cannot be kept there
//! is removed as if nobody had asked for it.
//!
//! Maintenance threads, under the lock that they take turns on; `open` and `deinit` when nobody else is in the log.
//! `isDue` and `isInTheWay` any thread.

const std = @import("std");
const assert = std.debug.assert;
const wal = @import("../../format/wal.zig");
const storage_module = @import("storage.zig");
const reader_module = @import("reader.zig");
const log_module = @import("log.zig");
const Log = log_module.Log;
const Segment = log_module.Segment;
const Directory = storage_module.Directory;
const Error = storage_module.Error;

pub const directory_name = "history";

/// Segments that the log may still grow by when history gives way to it: the one that is prepared next, and one for a
/// worker that overtakes that.
const room_segments = 2;

const Kept = struct {
    next: ?*Kept = null,
    size_bytes: u64,
    /// When its last record was written, by the clock; null: its header has not been looked at.
    sealed_realtime_ns: ?u64,
    /// A write to it failed, and may land late.
    write_failed: bool,
    name_length: u8,
    name_buffer: [storage_module.name_bytes_max]u8,

    fn name(kept: *const Kept) []const u8 {
        return kept.name_buffer[0..kept.name_length];
    }
};

pub const History = struct {
    directory: ?Directory = null,
    oldest: ?*Kept = null,
    newest: ?*Kept = null,
    /// When the oldest is to go, by the clock. Any thread.
    due_realtime_ns: std.atomic.Value(u64) = .init(never),
    /// Why a segment could not be kept, until somebody has asked.
    failure: ?Error = null,

    const never: u64 = std.math.maxInt(u64);

    /// What an earlier daemon has kept.
    pub fn open(history: *History, log: *Log) (Error || error{OutOfMemory})!void {
        assert(history.directory == null and history.oldest == null);
        history.directory = try log.storage.openDirectory(log.directory, directory_name);
        errdefer history.deinit(log);
        var found = Found{ .allocator = log.allocator };
        defer found.list.deinit(log.allocator);
        // Those that are not in the list yet.
        errdefer for (found.list.items) |kept| log.allocator.destroy(kept);
        try log.storage.list(history.directory.?, .{ .context = &found, .visit = Found.visit });
        if (found.out_of_memory) return error.OutOfMemory;
        // Their names begin with their first LSN.
        std.mem.sort(*Kept, found.list.items, {}, struct {
            fn lessThan(_: void, a: *Kept, b: *Kept) bool {
                return std.mem.lessThan(u8, a.name(), b.name());
            }
        }.lessThan);
        for (found.list.items) |kept| {
            history.append(kept);
            _ = log.bytes_held.fetchAdd(kept.size_bytes, .monotonic);
        }
        found.list.clearRetainingCapacity();
        history.noteDue(log);
    }

    const Found = struct {
        allocator: std.mem.Allocator,
        list: std.ArrayListUnmanaged(*Kept) = .empty,
        out_of_memory: bool = false,

        fn visit(context: *anyopaque, name: []const u8, kind: storage_module.EntryKind, size_bytes: u64) void {
            const found: *Found = @ptrCast(@alignCast(context));
            // What people put there is theirs.
            if (kind != .file or !std.mem.endsWith(u8, name, log_module.segment_suffix)) return;
            const kept = make(found.allocator, name, size_bytes, null, false) catch {
                found.out_of_memory = true;
                return;
            };
            found.list.append(found.allocator, kept) catch {
                found.allocator.destroy(kept);
                found.out_of_memory = true;
            };
        }
    };

    fn make(allocator: std.mem.Allocator, name: []const u8, size_bytes: u64, sealed_realtime_ns: ?u64, write_failed: bool) error{OutOfMemory}!*Kept {
        assert(name.len <= storage_module.name_bytes_max);
        const kept = try allocator.create(Kept);
        kept.* = .{
            .size_bytes = size_bytes,
            .sealed_realtime_ns = sealed_realtime_ns,
            .write_failed = write_failed,
            .name_length = @intCast(name.len),
            .name_buffer = undefined,
        };
        @memcpy(kept.name_buffer[0..name.len], name);
        return kept;
    }

    pub fn deinit(history: *History, log: *Log) void {
        while (history.oldest) |kept| history.dropOldest(log, kept);
        if (history.directory) |directory| log.storage.closeDirectory(directory);
        history.directory = null;
    }

    fn append(history: *History, kept: *Kept) void {
        if (history.newest) |newest| newest.next = kept else history.oldest = kept;
        history.newest = kept;
    }

    fn dropOldest(history: *History, log: *Log, kept: *Kept) void {
        assert(history.oldest == kept);
        history.oldest = kept.next;
        if (history.oldest == null) history.newest = null;
        log.allocator.destroy(kept);
    }

    /// The checkpoint is past the segment, and would remove it now. true: it is here instead, its memory free.
    /// The names are the caller's to sync.
    pub fn keep(history: *History, log: *Log, segment: *Segment) bool {
        assert(segment.last_lsn.load(.monotonic) <= log.applied_lsn);
        if (log.options.age_max_ns == 0) return false;
        if (segment.last_lsn.load(.monotonic) < segment.first_lsn) return false; // nothing in it ever counted
        history.take(log, segment) catch |err| {
            history.failure = switch (err) {
                error.OutOfMemory => error.OutOfKernelMemory,
                else => |other| other,
            };
            return false;
        };
        return true;
    }

    fn take(history: *History, log: *Log, segment: *Segment) (Error || error{OutOfMemory})!void {
        const directory = history.directory orelse try log.storage.openDirectory(log.directory, directory_name);
        history.directory = directory;
        const kept = try make(log.allocator, segment.name(), segment.size_bytes, segment.sealed_realtime_ns, segment.write_failed.load(.acquire));
        errdefer log.allocator.destroy(kept);
        try log.storage.rename(log.directory, segment.name(), directory, kept.name());
        history.append(kept);
        log.freeSegment(segment);
        history.noteDue(log);
    }

    pub fn takeFailure(history: *History) ?Error {
        defer history.failure = null;
        return history.failure;
    }

    /// `trim` has something to do.
    pub fn isDue(history: *const History, log: *const Log) bool {
        return history.isInTheWay(log) or history.due_realtime_ns.load(.monotonic) <= log.storage.realtimeNs();
    }

    /// The log may need the room before the next trim.
    pub fn isInTheWay(history: *const History, log: *const Log) bool {
        if (history.due_realtime_ns.load(.monotonic) == never) return false;
        return log.bytesHeld() + room_segments * log.options.segment_bytes > log.options.log_bytes_max;
    }

    /// Removes the oldest while they are too old, or the log needs their room. One of them becomes the log's reserve.
    pub fn trim(history: *History, log: *Log) Error!void {
        if (!history.isDue(log)) return;
        defer history.noteDue(log);
        while (history.oldest) |kept| {
            if (!history.isInTheWay(log) and history.dueNs(log, kept) > log.storage.realtimeNs()) break;
            if (log.reserve == null) log.reserve = history.recycleOldest(log);
            if (history.oldest != kept) continue;
            try log.unlinkSegment(history.directory.?, kept.name(), kept.size_bytes);
            history.dropOldest(log, kept);
        }
        try log.storage.syncDirectory(history.directory.?);
    }

    /// A prepared segment out of the oldest that is kept; null where it cannot have another life.
    pub fn recycleOldest(history: *History, log: *Log) ?*Segment {
        const kept = history.oldest orelse return null;
        if (!log.mayReuse(kept.size_bytes, kept.write_failed)) return null;
        const segment = log.allocator.create(Segment) catch return null;
        segment.* = .ofSize(kept.size_bytes);
        segment.setName(kept.name());
        defer history.noteDue(log);
        defer history.dropOldest(log, kept); // it is there, or gone
        return log.reuse(segment, history.directory.?);
    }

    fn noteDue(history: *History, log: *Log) void {
        const due_ns = if (history.oldest) |kept| (if (kept.sealed_realtime_ns == null) 0 else history.dueNs(log, kept)) else never;
        history.due_realtime_ns.store(due_ns, .monotonic);
    }

    fn dueNs(history: *History, log: *Log, kept: *Kept) u64 {
        if (kept.sealed_realtime_ns == null) kept.sealed_realtime_ns = sealedAt(history.directory.?, log, kept.name());
        return @min(kept.sealed_realtime_ns.? +| log.options.age_max_ns, never - 1);
    }

    /// 0: it does not say, and so it is older than anything.
    fn sealedAt(directory: Directory, log: *Log, name: []const u8) u64 {
        const file = log.storage.open(directory, name, log.direct) catch return 0;
        defer log.storage.close(file);
        const length = log.storage.read(file, log.maintenance_block, 0) catch return 0;
        if (length < wal.block_size) return 0;
        return switch (reader_module.parseSegmentHeader(log.maintenance_block)) {
            .valid => |header| header.sealed_realtime_ns,
            else => 0,
        };
    }
};
