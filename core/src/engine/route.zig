//! One route in the engine: its policy, its log, and the worker's state of it.

const std = @import("std");
const Log = @import("wal/log.zig").Log;
const Buffer = @import("buffers.zig").Buffer;
const File = @import("files.zig").File;
const routes = @import("../format/routes.zig");

pub const Route = struct {
    index: u32,
    name: []const u8,
    pattern: []const u8,
    flags: routes.Flags,
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
};

/// A checkpoint of one route on its way: the worker has its files synced, each on the thread of its file system, then
/// the maintenance thread writes the cursor and removes segments, then the worker takes the result.
pub const Checkpoint = struct {
    state: enum(u32) { idle, syncing, requested, done, failed } = .idle,
    /// All records up to here are applied, and released from the ring.
    /// Every file that is open has its identity in the log above this one, or the records that follow could
    /// not be placed.
    lsn: u64 = 0,
    /// Files whose sync is under way.
    syncs: u32 = 0,
    last_lsn: u64 = 0,
    last_ns: u64 = 0,
    /// The last cursor could not be written: the next one is tried an interval later.
    cursor_failed: bool = false,
};
