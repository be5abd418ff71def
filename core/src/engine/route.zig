//! One route in the engine: its policy, its log, and the worker's state of it.

const std = @import("std");
const Log = @import("wal/log.zig").Log;
const Buffer = @import("buffers.zig").Buffer;
const File = @import("files.zig").File;
const Sync = @import("syncs.zig").Sync;
const routes = @import("../format/routes.zig");
const Admission = @import("admission.zig").Admission;

pub const Route = struct {
    index: u32,
    name: []const u8,
    pattern: []const u8,
    flags: routes.Flags,
    /// When records become durable that nobody waits for. Set by the control thread, read by the worker.
    flush: Flush = .each_group,
    /// false: gone from the configuration; what its log holds is still applied, no new files are taken.
    configured: bool,
    log: *Log,

    // Worker thread.

    /// In the worker's list of routes with something under way.
    active: bool = false,
    /// Being filled from the ring.
    buffer: ?*Buffer = null,
    /// Committed, not yet applied; oldest first.
    applying_first: ?*Buffer = null,
    applying_last: ?*Buffer = null,
    /// Not 0: the last commit failed with this errno. `buffer` is kept then, and committed again.
    failed_errno: i32 = 0,
    failed_at_ns: u64 = 0,
    /// Read by maintenance.
    admission: Admission = .open,
    closed_at_ns: u64 = 0,
    closed_is_news: bool = false,
    /// Buffers from `applying_first` on.
    applying_count: u32 = 0,
    /// Somebody waits for durable records: the next sync is due.
    sync_wanted: bool = false,
    sync: Sync = .{},
    /// Not 0: the log holds records that are not durable and that no sync under way covers, the oldest since then.
    unsynced_since_ns: u64 = 0,
    /// Of the oldest of those, when its producer made it; `no_record` without one.
    oldest_undurable_ns: u64 = no_record,
    /// Highest LSN that is applied, with all below it, but for what files are to be rewritten from (File.rewrite_lsn).
    applied_lsn: u64 = 0,
    /// The last record that is not the daemon's own housekeeping.
    data_lsn: u64 = 0,
    /// Files that a replay has found, and that the worker does not know yet.
    replayed: std.ArrayListUnmanaged(*File) = .empty,
    /// Files whose targets fail.
    failed_files: u32 = 0,
    bytes_since_checkpoint: u64 = 0,
    checkpoint: Checkpoint = .{},

    pub const no_record: u64 = std.math.maxInt(u64);

    pub fn flushMode(route: *const Route) Flush {
        return @atomicLoad(Flush, &route.flush, .monotonic);
    }

    pub fn setFlush(route: *Route, flush: Flush) void {
        @atomicStore(Flush, &route.flush, flush, .monotonic);
    }
};

/// Nanoseconds that records may lie in the log without being synced.
pub const Flush = enum(u64) {
    /// flush: group, always. A group is durable with its write.
    each_group = 0,
    /// flush: none. When a checkpoint is due, or when somebody asks.
    when_asked = std.math.maxInt(u64),
    /// flush: interval.
    _,

    pub fn everyNs(interval_ns: u64) Flush {
        return @enumFromInt(interval_ns);
    }

    /// When records that lie there since `since_ns` are to be synced.
    pub fn dueNs(flush: Flush, since_ns: u64) u64 {
        return since_ns +| @intFromEnum(flush);
    }
};

/// A checkpoint of one route on its way: the worker has its files synced, each on the thread of its file system, then
/// the maintenance thread writes the cursor and removes segments, then the worker takes the result.
pub const Checkpoint = struct {
    state: enum(u32) { idle, syncing, requested, done, failed } = .idle,
    /// All records up to here are applied, and released from the ring.
    /// Every file that is open has its identity in the log above this one, or the records that follow could
    /// not be placed.
    lsn: u64 = 0,
    /// The identities of open files stand in the log up to here: durable before anything below them may go.
    identities_lsn: u64 = 0,
    /// Files whose sync is under way.
    syncs: u32 = 0,
    last_lsn: u64 = 0,
    last_ns: u64 = 0,
    /// One is due, and a group stands in the way that has not been written.
    waits: bool = false,
    /// The last cursor could not be written: the next one is tried an interval later.
    cursor_failed: bool = false,
};
