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
    /// Highest LSN that is applied, with all below it.
    applied_lsn: u64 = 0,
    /// The last record that is not the daemon's own housekeeping.
    data_lsn: u64 = 0,
    /// The highest LSN of a buffer that left the queue, whatever its targets refused.
    completed_lsn: u64 = 0,
    /// Applied but for runs that a target refused; they keep their bytes. Oldest first.
    pinned_first: ?*Buffer = null,
    pinned_last: ?*Buffer = null,
    /// Files written since the last checkpoint was handed over.
    checkpoint_next: std.ArrayListUnmanaged(*File) = .empty,
    /// No checkpoint until the next start: a target's sync failed, or there was no memory to note its files.
    checkpoint_blocked: bool = false,
    bytes_since_checkpoint: u64 = 0,
    checkpoint: Checkpoint = .{},
};

/// A checkpoint of one route on its way: worker fills it, maintenance thread does it, worker takes the result.
pub const Checkpoint = struct {
    state: enum(u32) { idle, requested, done, failed } = .idle,
    /// All records up to here are applied, and released from the ring.
    /// Every file that is open has its identity in the log above this one, or the records that follow could
    /// not be placed.
    lsn: u64 = 0,
    /// The files written since the last one.
    files: std.ArrayListUnmanaged(*File) = .empty,
    /// The file whose sync failed, and why.
    failed_file: ?*File = null,
    errno: i32 = 0,
    last_lsn: u64 = 0,
    last_ns: u64 = 0,
};
