//! The write-ahead log of one route: a directory of segments (format/wal.zig), a checkpoint, receipts of what was
//! ever lost, and a quarantine for what does not belong or cannot be read.
//!
//! Who may call what:
//!
//! ```
//! starting thread      open, recover, close (nobody else is in the log then)
//! worker thread        nextLsn, admits, commit, write, sync, beginSync, endSync, lendTail, takeTailBack
//! maintenance threads  prepareNextSegment, checkpoint, collect, trimHistory (they take turns on a lock of their own)
//! any thread           performSync, durableLsn, groupBytesMax, needsPreparation, prepareAnew, historyIsDue, bytesHeld
//! ```
//!
//! The worker takes no lock that maintenance holds, with one exception that it must wait for in any case: where it
//! has overtaken the zero-writing of a route's first segment, the megabyte that is being zero-written.
//!
//! A segment's life: prepared (space reserved, zero-written, header without a first LSN) → current (the header goes
//! out with the first group, in one write) → retired (full, or given up after a failed write) → recycled or removed
//! once the checkpoint is past it; or kept for a while before that (history.zig). Each segment that is put to use gets a higher epoch than all before, and its first
//! LSN is the one behind the last durable one; so whatever an older segment holds from there on was never
//! acknowledged, and does not count. That one rule voids the tail behind a failed write and the torn tail of an
//! earlier life.
//!
//! Two ways to make records durable. `commit` writes a group durably. `write` only writes it, into the page cache: its
//! records are *logged* (they survive this process, not a power cut) until `sync` makes all of them durable. What is not
//! synced lies in one segment at any time, behind the last durable record: a full segment is synced before the next one
//! is put to use, so that a segment's first LSN goes on saying that all below is durable. And it is kept in memory (the
//! tail), as it stands in the file: after a sync that failed, the kernel takes the pages for written, another sync of
//! them would succeed and prove nothing. So the tail goes from memory into a new segment, which is not in force before
//! all of it is durable there; until then the old one still has what it has.
//!
//! A sync may be another thread's work (`beginSync`, `performSync`, `endSync`): what is written meanwhile stands behind
//! what it covers, in the same segment, and in a second piece of memory.

const std = @import("std");
const assert = std.debug.assert;
const wal = @import("../../format/wal.zig");
const storage_module = @import("storage.zig");
const reader_module = @import("reader.zig");
const group_module = @import("group.zig");
const recovery_module = @import("recovery.zig");
const History = @import("history.zig").History;
const mutant = @import("mutant.zig");

pub const Storage = storage_module.Storage;
pub const LinuxStorage = storage_module.LinuxStorage;
pub const Group = group_module.Group;
pub const Fields = group_module.Fields;
pub const Visitor = recovery_module.Visitor;
pub const Pass = recovery_module.Pass;
pub const Recovery = recovery_module.Recovery;
pub const LsnRange = recovery_module.LsnRange;
pub const Note = recovery_module.Note;

const File = storage_module.File;
const Directory = storage_module.Directory;

pub const Options = struct {
    /// A multiple of 4096, at least reader.segment_bytes_min. A log that must take records of any length needs
    /// 2 MiB; groups are never larger than what one segment holds.
    segment_bytes: u64,
    /// Space that segments may take on the disk: at least two of them. Not counted: what is in quarantine, and one
    /// segment that a failed write may need.
    log_bytes_max: u64,
    /// How long segments are kept that the checkpoint has passed, from when they were full, by the clock, and as long
    /// as the log does not need their room. 0: not at all.
    age_max_ns: u64 = 0,
    /// Around the page cache, where the directory's file system supports it.
    direct: bool = true,
    /// Zero-writing goes in pieces of this size, a multiple of 4096 up to zero_bytes_max; a fresh segment has one of them
    /// when it is put to use. Small ones: each stands in the way of a commit.
    zero_bytes: u32 = zero_bytes_max,
    /// So far it is kept ahead of what is written, in the current segment and, from its beginning, in the next: at the speed
    /// of the log, not of the disk, which others use too.
    zero_ahead_bytes: u32 = 8 << 20,
    /// Where `open` says in words why it failed.
    explanation: ?*Explanation = null,
};

/// Words for an error of `Log.open` or `Log.recover`: what, where, why likely, what to do.
pub const Explanation = struct {
    buffer: [512]u8 = undefined,
    length: usize = 0,

    pub fn text(explanation: *const Explanation) []const u8 {
        return explanation.buffer[0..explanation.length];
    }

    pub fn set(explanation: *Explanation, comptime format: []const u8, arguments: anytype) void {
        var writer = std.Io.Writer.fixed(&explanation.buffer);
        // What does not fit is cut off.
        writer.print(format, arguments) catch {};
        explanation.length = writer.end;
    }
};

pub const CommitError = storage_module.Error || error{
    /// One more segment would pass log_bytes_max; nothing was written. Waiters get ENOSPC.
    LogFull,
};

pub const OpenError = storage_module.Error || error{
    OutOfMemory,
    /// The directory was written by another version of Elgate's log.
    LogVersion,
    InvalidOptions,
};

pub const RecoverError = storage_module.Error || error{ OutOfMemory, VisitorStopped };

/// The errno that waiters get for a commit's error.
pub fn errnoOf(err: CommitError) i32 {
    return switch (err) {
        error.LogFull => @intFromEnum(std.os.linux.E.NOSPC),
        else => |other| storage_module.errnoOf(other),
    };
}

/// The highest position of one ring that has records in a segment.
pub const RingMaximum = struct {
    ring_uuid: [16]u8,
    position: u64,
};

pub const SegmentSummary = struct {
    first_lsn: u64,
    last_lsn: u64,
    rings: []const RingMaximum,
    /// false: the segment has records of more rings than these.
    rings_complete: bool,
};

/// Asked before a segment below the checkpoint is removed: may its records be forgotten?
pub const MayRemove = struct {
    context: *anyopaque,
    ask: *const fn (context: *anyopaque, segment: *const SegmentSummary) bool,
};

pub const checkpoint_name = "checkpoint";
pub const quarantine_name = "quarantine";
pub const receipts_name = "receipts";
pub const segment_suffix = ".wal";
/// A segment that has not been put to use yet, or was not when its name was last looked at.
pub const spare_prefix = "spare-";

pub const zero_bytes_max = 256 << 10;
/// Never written (and in .bss, unlike a constant, which would make the library that much larger).
var zeros: [zero_bytes_max]u8 align(wal.block_size) = @splat(0);

const rings_per_segment_max = 64;

pub const Segment = struct {
    id: u64,
    predecessor_id: u64 = 0,
    epoch: u64 = 0,
    size_bytes: u64,
    /// Of those, what the file has: less where somebody has cut it short.
    readable_bytes: u64,
    created_realtime_ns: u64,
    /// 0 until it is put to use. The worker sets it before it hands the segment to maintenance.
    first_lsn: u64 = 0,
    /// Of the last acknowledged record; first_lsn - 1 where there is none.
    last_lsn: std.atomic.Value(u64) = .init(0),
    sealed_lsn: u64 = 0,
    sealed_realtime_ns: u64 = 0,
    file: ?File = null,
    /// Worker: the same file through the page cache, for what is not written durably.
    cached_file: ?File = null,
    name_buffer: [storage_module.name_bytes_max]u8 = undefined,
    name_length: u8 = 0,

    /// Worker: where the next group goes.
    write_offset: u64 = wal.block_size,
    /// Worker: block 0 does not yet say that the segment is in use.
    header_pending: bool = false,
    /// The end of all that the worker has ever started to write here; only for the assertion in `zeroNext`.
    written_end: std.atomic.Value(u64) = .init(0),

    /// Everything below is zero-written or the worker's; zeros are only ever written above, and the worker only
    /// ever writes below. Moves under `zero_mutex`.
    zeroed_bytes: std.atomic.Value(u64),
    zero_mutex: std.Thread.Mutex = .{},
    /// Under `zero_mutex`: writing zeros failed once, so nothing more is written above.
    zero_failed: bool = false,
    /// A write failed here, and may land late: the segment gets no other life. Set by worker or maintenance.
    write_failed: std.atomic.Value(bool) = .init(false),

    /// The worker is done with it. What stands above in this struct does not change any more (release/acquire).
    retired: std.atomic.Value(bool) = .init(false),

    /// Maintenance: name, header and descriptor are in their final state.
    tidied: bool = false,
    /// Maintenance: the disk refused to read some of it, so it is never unlinked or recycled.
    evidence: bool = false,

    ring_maxima: [rings_per_segment_max]RingMaximum = undefined,
    ring_count: u32 = 0,
    rings_complete: bool = true,

    /// Recovery: where it found the last group to end.
    scanned_end: ?u64 = null,
    /// Recovery: its first block does not say who it is; or its last one.
    known_by_last_block: bool = false,
    known_by_first_block: bool = false,
    /// Recovery: where its first and its last block name different segments, how many groups speak for this one.
    groups_counted: u64 = std.math.maxInt(u64),

    /// The list of segments that maintenance keeps, or the list of those that are new to it.
    next: ?*Segment = null,

    /// A segment of which no more is known.
    pub fn ofSize(size_bytes: u64) Segment {
        return .{ .id = 0, .size_bytes = size_bytes, .readable_bytes = size_bytes, .created_realtime_ns = 0, .zeroed_bytes = .init(size_bytes) };
    }

    pub fn name(segment: *const Segment) []const u8 {
        return segment.name_buffer[0..segment.name_length];
    }

    pub fn setName(segment: *Segment, new_name: []const u8) void {
        @memcpy(segment.name_buffer[0..new_name.len], new_name);
        segment.name_length = @intCast(new_name.len);
    }

    /// Groups lie between the header block and the trailer block.
    fn groupsEnd(segment: *const Segment) u64 {
        return segment.size_bytes - wal.block_size;
    }

    pub fn noteRing(segment: *Segment, ring_uuid: [16]u8, position: u64) void {
        if (std.mem.allEqual(u8, &ring_uuid, 0)) return;
        // The last one first: records of one ring come in long runs.
        var index = segment.ring_count;
        while (index > 0) {
            index -= 1;
            const maximum = &segment.ring_maxima[index];
            if (!std.mem.eql(u8, &maximum.ring_uuid, &ring_uuid)) continue;
            maximum.position = @max(maximum.position, position);
            return;
        }
        if (segment.ring_count == rings_per_segment_max) {
            segment.rings_complete = false;
            return;
        }
        segment.ring_maxima[segment.ring_count] = .{ .ring_uuid = ring_uuid, .position = position };
        segment.ring_count += 1;
    }
};

const Stage = enum { opened, recovering, recovered };

/// Groups as they stand in a segment, side by side, in memory that the worker has lent.
const Tail = struct {
    memory: []align(wal.block_size) u8 = &.{},
    bytes: usize = 0,

    fn groups(tail: *const Tail) []align(wal.block_size) u8 {
        return tail.memory[0..tail.bytes];
    }
};

const Syncing = struct {
    /// A futex.
    state: std.atomic.Value(u32) = .init(none),
    /// Written by the worker before the state says `begun`.
    file: File = undefined,
    last_lsn: u64 = 0,
    /// Written by whoever performs it, before the state says `performed`.
    result: storage_module.Error!void = {},

    const none = 0;
    const begun = 1;
    const under_way = 2;
    const performed = 3;
};

pub const Log = struct {
    allocator: std.mem.Allocator,
    storage: Storage,
    options: Options,
    path: []const u8,
    directory: Directory,
    direct: bool,
    /// Drawn once per log directory; stands in every segment, and in the attribute of every file.
    uuid: [16]u8,
    stage: Stage,
    recovery: Recovery,
    /// Why `recover` failed, in words.
    explanation: Explanation,
    /// What recovery and its notes are made of.
    arena: std.heap.ArenaAllocator,

    durable_lsn: std.atomic.Value(u64),
    /// Records up to here are written; those above durable_lsn are not synced. Starting or worker thread.
    logged_lsn: u64,
    /// What stands in `current` (or `broken`) above durable_lsn: first what a sync that is under way covers, then what was
    /// written since. Worker.
    covered: Tail,
    tail: Tail,
    /// The sync that covers `covered`. Begun by the worker, performed by whoever comes first.
    syncing: Syncing,
    /// A sync of it failed, or a write behind what was not synced: it is not touched any more, and given up once its tail
    /// is durable elsewhere. Worker.
    broken: ?*Segment,
    bytes_held: std.atomic.Value(u64),
    epoch: std.atomic.Value(u64),

    /// Written by the worker, read by maintenance for the zero-writing ahead.
    current: std.atomic.Value(?*Segment),
    /// Put there by maintenance, taken by the worker.
    spare: std.atomic.Value(?*Segment),
    /// Put to use by the worker and not yet seen by maintenance, newest first.
    added: std.atomic.Value(?*Segment),
    /// A segment was put to use in this life: there will be need for a next one.
    in_use: std.atomic.Value(bool),
    /// The current segment is to be zero-written further ahead, and maintenance has not begun with it.
    zeroing_wanted: std.atomic.Value(bool),
    /// See `hurry`.
    closing: std.atomic.Value(bool),
    /// The last preparation failed: not before a checkpoint, or another segment, is it worth the trouble again.
    preparation_failed: std.atomic.Value(bool),
    /// There was no room for another segment, by the disk or by log_bytes_max.
    no_room: std.atomic.Value(bool),
    /// Worker: the segment put to use last.
    newest_id: u64,
    /// Worker: one block, for the header of a segment that is put to use or sealed.
    header_block: *align(wal.block_size) [wal.block_size]u8,

    /// Maintenance threads take turns. All below is under it.
    maintenance: std.Thread.Mutex,
    maintenance_block: *align(wal.block_size) [wal.block_size]u8,
    /// Segments put to use, oldest first; this or an earlier daemon's.
    segments: ?*Segment,
    /// One more prepared segment, out of one that was below the checkpoint: the next spare.
    reserve: ?*Segment,
    history: History,
    checkpoint_file: ?File,
    checkpoint_sequence: u64,
    /// By the checkpoint's two blocks.
    applied_lsn: u64,
    applied_lsn_before: u64,

    /// Opens the log in `directory` (made where it is missing; what is above it must exist). What does not belong
    /// there is put aside and noted in the recovery, and stops nothing. The caller holds the directory's lock.
    pub fn open(allocator: std.mem.Allocator, storage: Storage, directory: []const u8, options: Options) OpenError!*Log {
        if (!optionsValid(options)) {
            if (options.explanation) |explanation| explanation.set(
                "log {s}: segments of {d} bytes, {d} at most in all. A segment must be a multiple of {d} between {d} and {d}, and the log have room for two",
                .{ directory, options.segment_bytes, options.log_bytes_max, wal.block_size, reader_module.segment_bytes_min, reader_module.segment_bytes_max },
            );
            return error.InvalidOptions;
        }
        const log = try allocator.create(Log);
        errdefer allocator.destroy(log);
        const blocks = try allocator.alignedAlloc([wal.block_size]u8, .fromByteUnits(wal.block_size), 2);
        errdefer allocator.free(blocks);
        @memset(std.mem.sliceAsBytes(blocks), 0);
        log.* = .{
            .allocator = allocator,
            .storage = storage,
            .options = options,
            .path = undefined,
            .directory = undefined,
            .direct = false,
            .uuid = undefined,
            .stage = .opened,
            .recovery = .{},
            .explanation = .{},
            .arena = .init(allocator),
            .durable_lsn = .init(0),
            .logged_lsn = 0,
            .covered = .{},
            .tail = .{},
            .syncing = .{},
            .broken = null,
            .bytes_held = .init(0),
            .epoch = .init(0),
            .current = .init(null),
            .spare = .init(null),
            .added = .init(null),
            .in_use = .init(false),
            .zeroing_wanted = .init(false),
            .closing = .init(false),
            .preparation_failed = .init(false),
            .no_room = .init(false),
            .newest_id = 0,
            .header_block = &blocks[0],
            .maintenance = .{},
            .maintenance_block = &blocks[1],
            .segments = null,
            .reserve = null,
            .history = .{},
            .checkpoint_file = null,
            .checkpoint_sequence = 0,
            .applied_lsn = 0,
            .applied_lsn_before = 0,
        };
        errdefer log.arena.deinit();
        errdefer if (options.explanation) |explanation| {
            explanation.* = log.explanation;
        };
        log.path = try log.arena.allocator().dupe(u8, directory);
        log.directory = storage.openDirectory(null, directory) catch |err| {
            log.explain("cannot open or make the log directory {s}: {s}. Check that the directory above it exists and that this user may write there", .{ directory, @errorName(err) });
            return err;
        };
        errdefer storage.closeDirectory(log.directory);
        errdefer log.releaseSegments();
        log.options.explanation = null; // the caller's, and only for this call
        log.direct = options.direct and storage.supportsDirect(log.directory);
        try recovery_module.openLog(log);
        return log;
    }

    fn optionsValid(options: Options) bool {
        return options.segment_bytes % wal.block_size == 0 and
            options.segment_bytes >= reader_module.segment_bytes_min and
            options.segment_bytes <= reader_module.segment_bytes_max and
            options.zero_bytes % wal.block_size == 0 and
            options.zero_bytes > 0 and options.zero_bytes <= zero_bytes_max and
            options.log_bytes_max / 2 >= options.segment_bytes;
    }

    /// Says why in words, for open and recover.
    pub fn explain(log: *Log, comptime format: []const u8, arguments: anytype) void {
        log.explanation.set(format, arguments);
    }

    /// Starting thread, once, before any commit. Gives every good record above the checkpoint to `visitor`, in LSN
    /// order, twice. What it delivers is durable before it is delivered. Afterwards the log goes on in a segment of
    /// its own; the result stays valid until `close`.
    pub fn recover(log: *Log, visitor: Visitor) RecoverError!*const Recovery {
        assert(log.stage == .opened);
        log.stage = .recovering;
        try recovery_module.recover(log, visitor);
        log.stage = .recovered;
        // The log may be smaller from now on. What is only too old can wait.
        if (log.history.isInTheWay(log)) log.trimHistory() catch {};
        return &log.recovery;
    }

    /// The LSN that the next group's first record gets.
    pub fn nextLsn(log: *const Log) u64 {
        return log.logged_lsn + 1;
    }

    /// Starting thread: where the log goes on.
    pub fn startBehind(log: *Log, lsn: u64) void {
        assert(log.stage != .recovered);
        log.logged_lsn = lsn;
        log.durable_lsn.store(lsn, .release);
    }

    /// All records up to this one are on stable storage. Any thread.
    pub fn durableLsn(log: *const Log) u64 {
        return log.durable_lsn.load(.acquire);
    }

    /// The longest group that a segment takes. Any thread.
    pub fn groupBytesMax(log: *const Log) u64 {
        return log.options.segment_bytes - 2 * wal.block_size;
    }

    /// Bytes that segments take on the disk, the prepared one included. Any thread.
    pub fn bytesHeld(log: *const Log) u64 {
        return log.bytes_held.load(.monotonic);
    }

    /// Worker thread. false: the current segment has no room for this many bytes, and none was found for another one:
    /// block or refuse, by the route's policy, until a checkpoint has made room, or the disk has some again.
    pub fn admits(log: *const Log, bytes: u64) bool {
        assert(bytes <= log.groupBytesMax());
        if (!log.no_room.load(.monotonic) or log.spare.load(.monotonic) != null) return true;
        const segment = log.current.load(.monotonic) orelse return false;
        return bytes <= segment.groupsEnd() - segment.write_offset;
    }

    /// Any thread. What failed at the last preparation may have changed.
    pub fn prepareAnew(log: *Log) void {
        log.preparation_failed.store(false, .monotonic);
    }

    /// Worker thread. One contiguous durable write; no allocation and no other call but where a segment is full and
    /// none is prepared. On success every record of the group is on stable storage, and durableLsn is its last. Only
    /// where all that was written before is durable.
    ///
    /// A failed write is never repeated on the same blocks: the segment is given up, sealed at the last durable LSN,
    /// and the group goes to a new one. If that fails too the error is returned; then none of the group's records
    /// counts. The same group may be committed again later, unchanged (which is the probe whether the fault has
    /// ended), or a new one be begun in its place.
    pub fn commit(log: *Log, group: *Group) CommitError!void {
        assert(!log.hasUnsynced() and log.broken == null);
        const bytes = log.checkGroup(group);
        if (bytes == 0) return;
        const segment = try log.segmentFor(bytes);
        log.writeGroup(segment, group, .durable) catch {
            if (mutant.is(.failed_write_repeated)) return log.writeGroup(segment, group, .durable);
            if (mutant.is(.failed_write_synced)) {
                try log.storage.sync(segment.file.?);
                segment.header_pending = false;
                log.wrote(segment, group);
                return log.becameDurable(segment, log.logged_lsn);
            }
            log.giveUp(segment);
            const other = try log.putToUse(bytes, .beyond_limit);
            log.writeGroup(other, group, .durable) catch |err| {
                log.giveUp(other);
                return err;
            };
        };
    }

    /// Records are written that are not durable. Worker thread.
    pub fn hasUnsynced(log: *const Log) bool {
        const unsynced = log.covered.bytes + log.tail.bytes > 0;
        assert(unsynced == (log.logged_lsn > log.durableLsn()));
        return unsynced;
    }

    /// Of those, some that no sync that is under way covers. Worker thread.
    pub fn hasUncovered(log: *const Log) bool {
        return log.tail.bytes > 0;
    }

    /// Worker thread. Memory to keep in what is not synced; the log's until `takeTailBack`.
    pub fn lendTail(log: *Log, memory: []align(wal.block_size) u8) void {
        assert(log.tail.memory.len == 0);
        assert(memory.len > 0 and memory.len % wal.block_size == 0);
        assert(log.covered.memory.len == 0 or log.covered.memory.len == memory.len);
        log.tail = .{ .memory = memory };
    }

    /// Worker thread. Memory that was lent and is not needed any more; null: there is none. As often as it gives some.
    pub fn takeTailBack(log: *Log) ?[]align(wal.block_size) u8 {
        for ([_]*Tail{ &log.covered, &log.tail }) |tail| {
            if (tail.bytes > 0 or tail.memory.len == 0) continue;
            defer tail.* = .{};
            return tail.memory;
        }
        return null;
    }

    /// Worker thread. Memory is lent that what is written next can be kept in.
    pub fn hasTail(log: *const Log) bool {
        return log.tail.memory.len > 0;
    }

    /// Worker thread. Room for groups that are not synced; 0 where no memory is lent.
    pub fn tailRoom(log: *const Log) usize {
        return log.tail.memory.len - log.tail.bytes;
    }

    /// Worker thread. As `commit`, but the records are only logged on success, until the next `sync`; `tailRoom` must
    /// have room for them. May sync what was written before (a full segment, a failed write); after an error that is
    /// as it was, and none of the group's records counts.
    pub fn write(log: *Log, group: *Group) CommitError!void {
        assert(log.stage == .recovered);
        const bytes = log.checkGroup(group);
        if (bytes == 0) return;
        assert(bytes <= log.tailRoom());
        if (log.broken != null) return log.rescue(group);
        if (log.current.load(.monotonic)) |segment| {
            if (!log.makeRoom(segment, bytes)) try log.sync();
        }
        const segment = try log.segmentFor(bytes);
        log.writeGroup(segment, group, .plain) catch {
            try log.finishSync();
            // Where that has failed as well, there is another one already.
            if (log.current.load(.monotonic) != segment) return log.write(group);
            log.breakOff(segment);
            return log.rescue(group);
        };
    }

    /// Worker thread. All records that were written are on stable storage when it returns. A failed sync is never
    /// repeated: what was not durable goes from memory into a new segment. If that fails too the error is returned, and
    /// nothing is lost yet: the next call tries another segment.
    pub fn sync(log: *Log) CommitError!void {
        try log.finishSync();
        if (!log.hasUnsynced()) return;
        if (log.broken != null) return log.rescue(null);
        log.beginSync();
        log.performSync();
        return log.endSync();
    }

    /// Worker thread. What was written so far is to be made durable, by whoever calls `performSync`; the worker goes on
    /// writing. It calls `endSync` when `isSyncPerformed`.
    pub fn beginSync(log: *Log) void {
        assert(!log.isSyncing() and log.broken == null);
        assert(log.tail.bytes > 0 and log.covered.bytes == 0);
        std.mem.swap(Tail, &log.covered, &log.tail);
        const segment = log.current.load(.monotonic).?;
        log.syncing.file = segment.cached_file orelse segment.file.?;
        log.syncing.last_lsn = log.logged_lsn;
        log.syncing.state.store(Syncing.begun, .release);
    }

    /// Any thread, any time: performs the sync that was begun, unless another thread does or has.
    pub fn performSync(log: *Log) void {
        const syncing = &log.syncing;
        if (syncing.state.cmpxchgStrong(Syncing.begun, Syncing.under_way, .acquire, .monotonic) != null) return;
        syncing.result = result: {
            if (mutant.is(.sync_left_out)) break :result;
            log.storage.sync(syncing.file) catch |err| {
                if (mutant.is(.failed_sync_repeated)) break :result log.storage.sync(syncing.file);
                break :result err;
            };
        };
        syncing.state.store(Syncing.performed, .release);
        std.Thread.Futex.wake(&syncing.state, 1);
    }

    /// Worker thread. Begun, and not ended.
    pub fn isSyncing(log: *const Log) bool {
        return log.syncing.state.load(.monotonic) != Syncing.none;
    }

    /// Worker thread. `endSync` will not wait.
    pub fn isSyncPerformed(log: *const Log) bool {
        return log.syncing.state.load(.acquire) == Syncing.performed;
    }

    fn finishSync(log: *Log) CommitError!void {
        if (!log.isSyncing()) return;
        log.performSync();
        while (!log.isSyncPerformed()) std.Thread.Futex.wait(&log.syncing.state, Syncing.under_way);
        return log.endSync();
    }

    /// Worker thread. What was written before the sync began is durable now; or else, all that is not durable as after
    /// any failed `sync`.
    pub fn endSync(log: *Log) CommitError!void {
        assert(log.isSyncPerformed());
        log.syncing.state.store(Syncing.none, .monotonic);
        const segment = log.current.load(.monotonic).?;
        log.syncing.result catch {
            log.breakOff(segment);
            return log.rescue(null);
        };
        log.becameDurable(segment, log.syncing.last_lsn);
        log.uncover();
    }

    /// What is covered is durable: what is written next may find room there.
    fn uncover(log: *Log) void {
        log.covered.bytes = 0;
        if (log.tail.memory.len == 0) std.mem.swap(Tail, &log.covered, &log.tail);
    }

    /// The tail, and the group behind it, durably into a new segment. That one's header goes last: from then on the
    /// records count there and not any more where they lie now.
    fn rescue(log: *Log, behind: ?*Group) CommitError!void {
        assert(log.current.load(.monotonic) == null and !log.isSyncing());
        const broken = log.broken.?;
        // Nobody was told of any record above the last durable one: there is nothing to be kept in it.
        errdefer if (!log.hasUnsynced()) log.giveUpBroken();
        const kept_bytes = log.tail.bytes;
        const tail_bytes = kept_bytes + if (behind) |group| group.commitBytes() else 0;
        const bytes = log.covered.bytes + tail_bytes;
        assert(bytes > 0 and tail_bytes <= log.tail.memory.len); // all of it had room in the broken one
        const segment = try log.putToUse(bytes, .beyond_limit);
        errdefer log.giveUp(segment);
        assert(segment.epoch > broken.epoch);
        if (behind) |group| {
            group.stamp(log.silentPlaceIn(segment), log.durableLsn(), log.storage.realtimeNs());
            @memcpy(log.tail.memory[kept_bytes..tail_bytes], group.commitMemory());
        }
        var place = log.silentPlaceIn(segment);
        const parts = [_][]align(wal.block_size) u8{ log.covered.groups(), log.tail.memory[0..tail_bytes] };
        for (parts) |part| {
            var records = group_module.Written{ .memory = part, .place = place };
            while (records.next()) |header| segment.noteRing(header.ring_uuid, header.position);
            place.offset += part.len;
        }
        if (!log.makeRoom(segment, bytes)) return error.InputOutput;
        segment.written_end.store(segment.write_offset + bytes, .monotonic);
        if (mutant.is(.tail_voided_first)) try log.putInForce(segment);
        // One write, without what is empty.
        const vectors = [_][]const u8{ parts[0], parts[1] };
        const first: usize = @intFromBool(parts[0].len == 0);
        const end: usize = if (parts[1].len == 0) 1 else 2;
        try log.storage.write(segment.file.?, vectors[first..end], segment.write_offset, true);
        if (!mutant.is(.tail_voided_first)) try log.putInForce(segment);
        segment.write_offset += bytes;
        log.wantZeros(segment);
        if (behind) |group| log.logged_lsn = group.lastLsn();
        log.becameDurable(segment, log.logged_lsn);
        log.tail.bytes = 0;
        log.uncover();
        log.giveUpBroken();
    }

    fn becameDurable(log: *Log, segment: *Segment, last_lsn: u64) void {
        segment.last_lsn.store(last_lsn, .monotonic);
        log.durable_lsn.store(last_lsn, .release);
    }

    fn breakOff(log: *Log, segment: *Segment) void {
        assert(log.broken == null);
        log.current.store(null, .release);
        log.broken = segment;
    }

    fn giveUpBroken(log: *Log) void {
        log.giveUp(log.broken.?);
        log.broken = null;
    }

    /// The commit's bytes; 0: there is nothing in it.
    fn checkGroup(log: *const Log, group: *const Group) u32 {
        assert(log.stage != .opened);
        assert(group.log == log);
        assert(group.first_lsn == log.nextLsn());
        if (group.isEmpty()) return 0;
        assert(group.commitBytes() <= log.groupBytesMax());
        return group.commitBytes();
    }

    /// The current segment where it has room, else the next one. What is in the current one must be durable then.
    fn segmentFor(log: *Log, bytes: u64) CommitError!*Segment {
        if (log.current.load(.monotonic)) |segment| {
            if (log.makeRoom(segment, bytes)) return segment;
            assert(!log.hasUnsynced());
            log.retire(segment);
        }
        return log.putToUse(bytes, .within_limit);
    }

    /// Starting thread, in a recovery: a group durably into a segment that is not in force before `finishMove`, so
    /// that its records go on counting where they lie until all of them are here. `total_bytes`: of all that will be
    /// moved.
    pub fn moveGroup(log: *Log, group: *Group, total_bytes: u64) CommitError!void {
        assert(log.stage == .recovering);
        assert(group.first_lsn == log.nextLsn());
        const bytes = group.commitBytes();
        const segment = log.current.load(.monotonic) orelse try log.putToUse(total_bytes, .beyond_limit);
        if (!log.makeRoom(segment, bytes)) return error.InputOutput;
        group.stamp(log.silentPlaceIn(segment), log.durableLsn(), log.storage.realtimeNs());
        segment.written_end.store(segment.write_offset + bytes, .monotonic);
        if (mutant.is(.tail_voided_first) and segment.write_offset == wal.block_size) {
            log.fillHeader(log.header_block, segment);
            try log.storage.write(segment.file.?, &.{log.header_block}, 0, true);
        }
        try log.storage.write(segment.file.?, &.{group.commitMemory()}, segment.write_offset, true);
        log.wrote(segment, group);
    }

    pub fn finishMove(log: *Log) CommitError!void {
        const segment = log.current.load(.monotonic).?;
        try log.putInForce(segment);
        log.becameDurable(segment, log.logged_lsn);
    }

    /// What was moved stays where it was.
    pub fn abandonMove(log: *Log) void {
        if (log.current.load(.monotonic)) |segment| log.giveUp(segment);
        log.logged_lsn = log.durableLsn();
    }

    /// Its records lie in it, durable: from here on they count here alone.
    fn putInForce(log: *Log, segment: *Segment) storage_module.Error!void {
        assert(segment.header_pending);
        log.fillHeader(log.header_block, segment);
        try log.storage.write(segment.file.?, &.{log.header_block}, 0, true);
        // The last block says it too, since the groups do not.
        try log.storage.write(segment.file.?, &.{log.header_block}, segment.groupsEnd(), true);
        segment.header_pending = false;
    }

    /// Room for a commit in the current segment, zero-written; false where it is full, or cannot be zero-written.
    fn makeRoom(log: *Log, segment: *Segment, bytes: u64) bool {
        const end = segment.write_offset + bytes;
        if (end > segment.groupsEnd()) return false;
        while (segment.zeroed_bytes.load(.acquire) < end) {
            // Overtaken: nothing can be written there before it is zero-written, so that is done here, or waited
            // for where maintenance is at it.
            log.zeroNext(segment, end, false) catch return false;
        }
        return true;
    }

    /// Zero-writes the next piece of a segment, unless everything below `wanted_end` is by now. Worker or
    /// maintenance. The invariant: writes of zeros start at zeroed_bytes, and writes of groups end at or below it.
    fn zeroNext(log: *Log, segment: *Segment, wanted_end: u64, durable: bool) storage_module.Error!void {
        segment.zero_mutex.lock();
        defer segment.zero_mutex.unlock();
        const start = segment.zeroed_bytes.load(.monotonic);
        if (start >= wanted_end) return;
        if (segment.zero_failed) return error.InputOutput;
        assert(segment.written_end.load(.monotonic) <= start);
        const count = @min(log.options.zero_bytes, segment.groupsEnd() - start);
        errdefer {
            segment.zero_failed = true;
            segment.write_failed.store(true, .release);
        }
        try log.storage.write(segment.file.?, &.{zeros[0..count]}, start, durable or start + count == segment.groupsEnd());
        segment.zeroed_bytes.store(start + count, .release);
    }

    const How = enum { durable, plain };

    fn writeGroup(log: *Log, segment: *Segment, group: *Group, how: How) storage_module.Error!void {
        assert(log.stage == .recovered);
        const bytes = group.commitBytes();
        // A segment that was just put to use may not be zero-written to here: preparing it was cut short.
        if (!log.makeRoom(segment, bytes)) return error.InputOutput;
        assert(segment.write_offset % wal.block_size == 0);
        group.stamp(log.placeIn(segment), log.durableLsn(), log.storage.realtimeNs());
        const memory = group.commitMemory();
        segment.written_end.store(segment.write_offset + bytes, .monotonic);
        const file = if (how == .durable) segment.file.? else log.cachedFile(segment);
        const synced = how == .durable and !mutant.is(.commit_not_synced);
        if (segment.header_pending) {
            assert(segment.write_offset == wal.block_size);
            log.fillHeader(log.header_block, segment);
            // Header and first group lie side by side: one write, and whoever finds the one without the other
            // finds nothing that was acknowledged.
            try log.storage.write(file, &.{ log.header_block, memory }, 0, synced);
            segment.header_pending = false;
        } else {
            if (mutant.is(.block_rewritten)) try mutant.rewriteBlockBefore(log.storage, segment.file.?, segment.write_offset);
            try log.storage.write(file, &.{memory}, segment.write_offset, synced);
        }
        log.wrote(segment, group);
        if (how == .durable) return log.becameDurable(segment, log.logged_lsn);
        @memcpy(log.tail.memory[log.tail.bytes..][0..memory.len], memory);
        log.tail.bytes += memory.len;
    }

    /// Where the next group goes.
    fn placeIn(log: *const Log, segment: *const Segment) Group.Place {
        _ = log;
        return .{ .segment_id = segment.id, .segment_first_lsn = segment.first_lsn, .segment_epoch = segment.epoch, .offset = segment.write_offset };
    }

    /// The same in a segment that is not in force before its header says so: a group there must not speak for it.
    fn silentPlaceIn(log: *const Log, segment: *const Segment) Group.Place {
        assert(segment.header_pending);
        var place = log.placeIn(segment);
        place.segment_first_lsn = 0;
        return place;
    }

    fn wrote(log: *Log, segment: *Segment, group: *const Group) void {
        segment.write_offset += group.commitBytes();
        log.wantZeros(segment);
        var records = group.records();
        while (records.next()) |slot| segment.noteRing(slot.header.ring_uuid, slot.header.position);
        log.logged_lsn = group.lastLsn();
    }

    /// Through the page cache a small write costs a tenth of what it costs around it, and the groups between two syncs
    /// become one write of the disk.
    fn cachedFile(log: *Log, segment: *Segment) File {
        if (!log.direct) return segment.file.?;
        if (segment.cached_file == null) segment.cached_file = log.storage.open(log.directory, segment.name(), false) catch null;
        return segment.cached_file orelse segment.file.?; // no descriptor to be had: around the cache, then
    }

    /// Makes the prepared segment, or a fresh one, with room for `bytes` of groups, the current one. That it is
    /// zero-written as far as it is needed is for the caller to see to.
    fn putToUse(log: *Log, bytes: u64, limit: Limit) CommitError!*Segment {
        assert(!log.hasUnsynced() or log.broken != null);
        // What an earlier life has left to be moved may be more than one of today's segments holds.
        const size_bytes = @max(log.options.segment_bytes, bytes + 2 * wal.block_size);
        const prepared = if (size_bytes == log.options.segment_bytes) log.spare.swap(null, .acquire) else null;
        const segment = prepared orelse
            try log.createSegment(size_bytes, @max(log.options.zero_bytes, wal.block_size + bytes), limit);
        assert(bytes <= segment.groupsEnd() - segment.write_offset);
        segment.first_lsn = log.durableLsn() + 1;
        segment.last_lsn.store(segment.first_lsn - 1, .monotonic);
        segment.epoch = log.epoch.fetchAdd(1, .monotonic) + 1;
        segment.predecessor_id = log.newest_id;
        segment.header_pending = true;
        log.newest_id = segment.id;
        // Only the worker pushes, so nothing can come between but a taker, who takes all.
        segment.next = log.added.load(.monotonic);
        while (log.added.cmpxchgWeak(segment.next, segment, .release, .monotonic)) |seen| segment.next = seen;
        log.current.store(segment, .release);
        log.zeroing_wanted.store(false, .monotonic);
        log.wantZeros(segment);
        log.preparation_failed.store(false, .monotonic);
        log.no_room.store(false, .monotonic);
        log.in_use.store(true, .release);
        return segment;
    }

    fn retire(log: *Log, segment: *Segment) void {
        assert(log.current.load(.monotonic) == segment or log.broken == segment);
        if (log.current.load(.monotonic) == segment) log.current.store(null, .release);
        if (segment.cached_file) |file| log.storage.close(file);
        segment.cached_file = null;
        segment.retired.store(true, .release);
    }

    /// After a failed write. Its header block holds no acknowledged record, so it may say where the segment ends;
    /// where that fails too, the next segment's first LSN says the same.
    fn giveUp(log: *Log, segment: *Segment) void {
        segment.write_failed.store(true, .release);
        if (segment.last_lsn.load(.monotonic) >= segment.first_lsn) {
            // Where it is not written, the next segment's first LSN says the same.
            log.seal(segment, segment.file.?, log.header_block) catch {};
        }
        log.retire(segment);
    }

    /// No record above the last one counts, says the header from now on.
    fn seal(log: *Log, segment: *Segment, file: File, block: *align(wal.block_size) [wal.block_size]u8) storage_module.Error!void {
        assert(segment.first_lsn > 0);
        segment.sealed_lsn = segment.last_lsn.load(.monotonic);
        segment.sealed_realtime_ns = log.storage.realtimeNs();
        @memset(block, 0);
        log.fillHeader(block, segment);
        errdefer segment.write_failed.store(true, .release);
        try log.storage.write(file, &.{block}, 0, true);
    }

    /// For recovery: a segment of an earlier life, whose end is known now. The next segment's first LSN says the same,
    /// but that one might be damaged one day, and then a torn tail must not come back to life.
    pub fn sealOld(log: *Log, segment: *Segment) void {
        if (segment.last_lsn.load(.monotonic) == 0) return; // which would mean not sealed
        if (segment.known_by_first_block) return; // which a write that is cut short would be the end of
        const file = segment.file orelse log.storage.open(log.directory, segment.name(), log.direct) catch return;
        defer if (segment.file == null) log.storage.close(file);
        log.seal(segment, file, log.maintenance_block) catch {};
    }

    fn fillHeader(log: *const Log, block: *align(wal.block_size) [wal.block_size]u8, segment: *const Segment) void {
        const header: *wal.SegmentHeader = @ptrCast(block);
        header.* = .{
            .header_checksum = 0,
            .version = wal.version,
            .reserved_0 = 0,
            .magic = wal.segment_magic,
            .log_uuid = log.uuid,
            .segment_id = segment.id,
            .predecessor_id = segment.predecessor_id,
            .first_lsn = segment.first_lsn,
            .epoch = segment.epoch,
            .sealed_lsn = segment.sealed_lsn,
            .size_bytes = segment.size_bytes,
            .created_realtime_ns = segment.created_realtime_ns,
            .sealed_realtime_ns = segment.sealed_realtime_ns,
            .reserved_1 = @splat(0),
        };
        header.header_checksum = header.computeChecksum();
    }

    const Limit = enum {
        within_limit,
        /// For what must go somewhere: the tail of a segment whose write failed, or of an earlier life.
        beyond_limit,
    };

    /// A segment that is ready for use, its first part zero-written, all of it reserved, and its name durable.
    /// Worker or maintenance.
    fn createSegment(log: *Log, size_bytes: u64, zeroed_bytes: u64, limit: Limit) CommitError!*Segment {
        const held = log.bytes_held.fetchAdd(size_bytes, .monotonic);
        errdefer _ = log.bytes_held.fetchSub(size_bytes, .monotonic);
        if (limit == .within_limit and held + size_bytes > log.options.log_bytes_max) return error.LogFull;

        const block = log.allocator.alignedAlloc(u8, .fromByteUnits(wal.block_size), wal.block_size) catch return error.OutOfKernelMemory;
        defer log.allocator.free(block);
        const segment = log.allocator.create(Segment) catch return error.OutOfKernelMemory;
        errdefer log.allocator.destroy(segment);
        const now_ns = log.storage.realtimeNs();
        segment.* = .{
            .id = log.drawSegmentId(),
            .epoch = log.epoch.load(.monotonic) + 1,
            .size_bytes = size_bytes,
            .readable_bytes = size_bytes,
            .created_realtime_ns = now_ns,
            .zeroed_bytes = .init(0),
        };
        var buffer: [name_bytes]u8 = undefined;
        segment.setName(spareName(&buffer, now_ns, segment.id));
        segment.file = try log.storage.create(log.directory, segment.name(), log.direct);
        errdefer {
            log.storage.close(segment.file.?);
            // It holds nothing. Where it stays, the next start removes it.
            log.storage.unlink(log.directory, segment.name()) catch {};
        }
        var zeroed_end = @min(zeroed_bytes, segment.groupsEnd());
        log.storage.allocate(segment.file.?, size_bytes) catch |err| switch (err) {
            // Then only writing it reserves it.
            error.NotSupported => zeroed_end = segment.groupsEnd(),
            else => return err,
        };
        var offset: u64 = 0;
        while (offset < zeroed_end) {
            if (offset > 0 and log.closing.load(.monotonic)) {
                // Nobody will wait for the rest: it is zero-written when the segment is used, like any other.
                zeroed_end = offset;
                break;
            }
            const count = @min(log.options.zero_bytes, zeroed_end - offset);
            try log.storage.write(segment.file.?, &.{zeros[0..count]}, offset, false);
            offset += count;
        }
        segment.zeroed_bytes.store(zeroed_end, .monotonic);
        try log.writePreparedHeader(segment, block[0..wal.block_size]);
        try log.syncNames();
        return segment;
    }

    /// Block 0 and, in case that is ever damaged, the last block say whose segment this is, but no first LSN: it is
    /// prepared. Durable on return, with all that was written before.
    fn writePreparedHeader(log: *Log, segment: *Segment, block: *align(wal.block_size) [wal.block_size]u8) storage_module.Error!void {
        assert(segment.first_lsn == 0);
        @memset(block, 0);
        log.fillHeader(block, segment);
        try log.storage.write(segment.file.?, &.{block}, segment.groupsEnd(), false);
        try log.storage.write(segment.file.?, &.{block}, 0, false);
        if (!mutant.is(.preparation_not_synced)) try log.storage.sync(segment.file.?);
    }

    fn syncNames(log: *Log) storage_module.Error!void {
        if (mutant.is(.directory_not_synced)) return;
        return log.storage.syncDirectory(log.directory);
    }

    fn drawSegmentId(log: *Log) u64 {
        while (true) {
            const id = log.storage.randomU64();
            if (id != 0) return id;
        }
    }

    /// Any thread. The log is about to be closed: what is prepared ahead of need is cut short.
    pub fn hurry(log: *Log) void {
        log.closing.store(true, .monotonic);
    }

    /// Any thread. `prepareNextSegment` has something to do. A route without records keeps no prepared segment.
    pub fn needsPreparation(log: *const Log) bool {
        if (log.added.load(.monotonic) != null) return true;
        if (log.preparation_failed.load(.monotonic)) return false;
        if (!log.in_use.load(.monotonic)) return false;
        return log.spare.load(.monotonic) == null or log.zeroing_wanted.load(.monotonic);
    }

    /// Maintenance thread, ahead of need: zero-writes the current segment further ahead, gets the next one ready,
    /// gives retired ones their final name and header. LogFull where there may be no further segment now. After an
    /// error the call can be repeated.
    pub fn prepareNextSegment(log: *Log) CommitError!void {
        assert(log.stage == .recovered);
        log.maintenance.lock();
        defer log.maintenance.unlock();
        log.takeAdded();
        // What is only kept makes room first, and what gives way becomes the next segment.
        log.history.trim(log) catch {};
        errdefer |err| {
            log.preparation_failed.store(true, .monotonic);
            log.no_room.store(err == error.LogFull or err == error.NoSpace or err == error.QuotaExceeded, .monotonic);
        }
        const zeros_wanted = log.zeroing_wanted.swap(false, .acquire);
        const current = log.current.load(.acquire);
        // Where it fails the segment ends there, which the worker finds by itself.
        if (zeros_wanted) if (current) |segment| log.zeroAhead(segment, segment) catch {};
        if (log.in_use.load(.acquire) and log.spare.load(.monotonic) == null) {
            const prepared = try log.prepareOne();
            const before = log.spare.swap(prepared, .release);
            assert(before == null);
            log.no_room.store(false, .monotonic);
        }
        if (zeros_wanted) if (current) |segment| if (log.spare.load(.monotonic)) |spare| log.zeroAhead(spare, segment) catch {};
        try log.tidySegments();
    }

    fn prepareOne(log: *Log) CommitError!*Segment {
        if (log.reserve) |segment| {
            log.reserve = null;
            return segment;
        }
        return log.createSegment(log.options.segment_bytes, log.options.zero_bytes, .within_limit) catch |err| switch (err) {
            // What is only kept has its blocks already.
            error.NoSpace, error.QuotaExceeded => log.history.recycleOldest(log) orelse err,
            else => err,
        };
    }

    /// The worker may retire the segment meanwhile; it stays until maintenance removes it.
    fn zeroAhead(log: *Log, segment: *Segment, current: *const Segment) storage_module.Error!void {
        while (!segment.retired.load(.acquire) and !log.closing.load(.monotonic)) {
            const written_end = current.written_end.load(.monotonic);
            // While it is written to, few times: writes of groups wait for these. The next one little by little.
            const goal = if (segment == current) 2 * written_end + log.options.zero_ahead_bytes else written_end + log.options.zero_ahead_bytes;
            const zeroed = segment.zeroed_bytes.load(.monotonic);
            if (zeroed >= @min(goal, segment.groupsEnd())) return;
            try log.zeroNext(segment, zeroed + 1, segment == current);
        }
    }

    /// Worker thread. Much of what was zero-written ahead is used up: in the current segment; or in the next one, which is to
    /// be ready when this one is full.
    fn wantZeros(log: *Log, current: *const Segment) void {
        const ahead = log.options.zero_ahead_bytes;
        var wanted = current.zeroed_bytes.load(.monotonic) < @min(current.write_offset + ahead / 2, current.groupsEnd());
        if (log.spare.load(.acquire)) |spare| {
            wanted = wanted or spare.zeroed_bytes.load(.monotonic) < @min(current.write_offset + ahead / 8 * 7, spare.groupsEnd());
        }
        if (wanted) log.zeroing_wanted.store(true, .release);
    }

    /// Moves what the worker has put to use to maintenance's own list.
    pub fn takeAdded(log: *Log) void {
        var newest_first = log.added.swap(null, .acquire);
        var oldest_first: ?*Segment = null;
        while (newest_first) |segment| {
            newest_first = segment.next;
            segment.next = oldest_first;
            oldest_first = segment;
        }
        var end = &log.segments;
        while (end.*) |segment| end = &segment.next;
        end.* = oldest_first;
    }

    /// Final header, final name, no descriptor; and what never held an acknowledged record goes.
    fn tidySegments(log: *Log) storage_module.Error!void {
        var renamed = false;
        var link = &log.segments;
        while (link.*) |segment| {
            if (segment.tidied or !segment.retired.load(.acquire)) {
                link = &segment.next;
                continue;
            }
            if (segment.last_lsn.load(.monotonic) < segment.first_lsn) {
                try log.unlinkSegment(log.directory, segment.name(), segment.size_bytes);
                link.* = segment.next;
                log.freeSegment(segment);
                renamed = true;
                continue;
            }
            if (segment.sealed_lsn == 0) log.seal(segment, segment.file.?, log.maintenance_block) catch {};
            var buffer: [name_bytes]u8 = undefined;
            const final = finalName(&buffer, segment.first_lsn, segment.created_realtime_ns);
            if (log.storage.rename(log.directory, segment.name(), log.directory, final)) {
                segment.setName(final);
                renamed = true;
            } else |_| {
                // The name is for people.
            }
            log.storage.close(segment.file.?);
            segment.file = null;
            segment.tidied = true;
            link = &segment.next;
        }
        if (renamed) try log.syncNames();
    }

    pub fn unlinkSegment(log: *Log, directory: Directory, name: []const u8, size_bytes: u64) storage_module.Error!void {
        log.storage.unlink(directory, name) catch |err| switch (err) {
            error.NotFound => {},
            else => return err,
        };
        _ = log.bytes_held.fetchSub(size_bytes, .monotonic);
    }

    /// Closes and frees; the file stays as it is.
    pub fn freeSegment(log: *Log, segment: *Segment) void {
        if (segment.cached_file) |file| log.storage.close(file);
        if (segment.file) |file| log.storage.close(file);
        log.allocator.destroy(segment);
    }

    pub fn mayReuse(log: *const Log, size_bytes: u64, write_failed: bool) bool {
        return size_bytes == log.options.segment_bytes and (!write_failed or mutant.is(.failed_segment_recycled));
    }

    /// A new life for a segment whose records count no more: its blocks are written already, which a fresh one's are
    /// not. null where it cannot be had; then the segment is gone.
    pub fn reuse(log: *Log, segment: *Segment, from: Directory) ?*Segment {
        assert(segment.size_bytes == log.options.segment_bytes);
        log.prepareAgain(segment, from) catch {
            log.freeSegment(segment);
            return null;
        };
        return segment;
    }

    /// The header first, then the name: in the log's directory there is never one that says it holds what it holds no
    /// more, or what the log has long forgotten.
    fn prepareAgain(log: *Log, segment: *Segment, from: Directory) storage_module.Error!void {
        const now_ns = log.storage.realtimeNs();
        const size_bytes = segment.size_bytes;
        var directory = from;
        // Whatever it is that is wrong with it. Where it cannot be removed either, the next start sees to it.
        errdefer log.unlinkSegment(directory, segment.name(), size_bytes) catch {};
        const file = segment.file orelse try log.storage.open(directory, segment.name(), log.direct);
        var fresh = Segment.ofSize(size_bytes);
        fresh.id = log.drawSegmentId();
        fresh.epoch = log.epoch.load(.monotonic) + 1;
        fresh.created_realtime_ns = now_ns;
        fresh.file = file;
        fresh.zeroed_bytes = .init(fresh.groupsEnd());
        fresh.setName(segment.name());
        segment.* = fresh;
        // It may have been found cut short, or with holes.
        log.storage.allocate(file, size_bytes) catch |err| if (err != error.NotSupported) return err;
        try log.writePreparedHeader(segment, log.maintenance_block);
        var buffer: [name_bytes]u8 = undefined;
        const spare_name = spareName(&buffer, now_ns, segment.id);
        try log.storage.rename(from, segment.name(), log.directory, spare_name);
        segment.setName(spare_name);
        directory = log.directory;
        try log.syncNames();
    }

    /// Maintenance thread. Everything up to and including `applied_lsn` is durable in its target: says so durably.
    /// Nothing is removed before that.
    pub fn checkpoint(log: *Log, applied_lsn: u64) storage_module.Error!void {
        assert(log.stage == .recovered);
        log.maintenance.lock();
        defer log.maintenance.unlock();
        assert(applied_lsn <= log.durableLsn());
        log.preparation_failed.store(false, .monotonic);
        try log.writeCheckpoint(@max(applied_lsn, log.applied_lsn));
    }

    /// The block that was written longer ago is written, so that one whole block is there at any time.
    pub fn writeCheckpoint(log: *Log, applied_lsn: u64) storage_module.Error!void {
        try log.writeCheckpointBlock(log.checkpoint_sequence + 1, applied_lsn);
        log.applied_lsn_before = log.applied_lsn;
        log.applied_lsn = applied_lsn;
    }

    /// For open: the checkpoint as it was read, on its own block again. It may have been read from pages that the
    /// kernel has given up writing, so that the other block is the only one on the disk, and that is the next to be
    /// written.
    pub fn confirmCheckpoint(log: *Log) storage_module.Error!void {
        try log.writeCheckpointBlock(@max(log.checkpoint_sequence, 1), log.applied_lsn);
        // By the other block, of which nothing is known.
        log.applied_lsn_before = 0;
    }

    fn writeCheckpointBlock(log: *Log, sequence: u64, applied_lsn: u64) storage_module.Error!void {
        @memset(log.maintenance_block, 0);
        const block: *wal.Checkpoint = @ptrCast(log.maintenance_block);
        block.* = .{
            .header_checksum = 0,
            .version = wal.version,
            .reserved_0 = 0,
            .magic = wal.checkpoint_magic,
            .log_uuid = log.uuid,
            .sequence = sequence,
            .applied_lsn = applied_lsn,
            .durable_lsn = log.durableLsn(),
            .written_realtime_ns = log.storage.realtimeNs(),
        };
        block.header_checksum = block.computeChecksum();
        try log.storage.write(log.checkpoint_file.?, &.{log.maintenance_block}, (sequence % 2) * wal.block_size, true);
        log.checkpoint_sequence = sequence;
    }

    /// Maintenance thread. Removes whole segments below the checkpoint, oldest first, up to the first that may not
    /// go (or moves them to the history); one of them is kept for a new life. The newest segment always stays: its first LSN is what voids the
    /// tails of those before it. After an error the call can be repeated.
    pub fn collect(log: *Log, may_remove: MayRemove) storage_module.Error!void {
        assert(log.stage == .recovered);
        log.maintenance.lock();
        defer log.maintenance.unlock();
        log.takeAdded();
        try log.tidySegments();
        var removed = false;
        errdefer if (removed) log.syncNames() catch {};
        while (log.segments) |segment| {
            if (segment.next == null or !segment.tidied) break;
            const last_lsn = segment.last_lsn.load(.monotonic);
            if (last_lsn > log.applied_lsn) break;
            const summary = SegmentSummary{
                .first_lsn = segment.first_lsn,
                .last_lsn = last_lsn,
                .rings = segment.ring_maxima[0..segment.ring_count],
                .rings_complete = segment.rings_complete,
            };
            if (!may_remove.ask(may_remove.context, &summary)) break;
            // Oldest first, on the disk too: should the checkpoint ever be lost, the segments alone say what is there.
            if (removed) try log.syncNames();
            // Either block of the checkpoint alone must be enough, should the other one be damaged.
            if (last_lsn > log.applied_lsn_before and !mutant.is(.one_checkpoint_block_enough)) try log.writeCheckpoint(log.applied_lsn);
            assert(last_lsn <= log.applied_lsn_before or mutant.is(.one_checkpoint_block_enough));
            const next = segment.next;
            if (segment.evidence) {
                recovery_module.quarantine(log, segment.name()) catch |err| switch (err) {
                    error.NotFound => {}, // moved, but not synced, by an attempt before
                    else => return err,
                };
                _ = log.bytes_held.fetchSub(segment.size_bytes, .monotonic);
                log.freeSegment(segment);
            } else if (log.history.keep(log, segment)) {
                // The next start looks there.
            } else if (log.reserve == null and log.mayReuse(segment.size_bytes, segment.write_failed.load(.acquire))) {
                log.reserve = log.reuse(segment, log.directory);
            } else {
                try log.unlinkSegment(log.directory, segment.name(), segment.size_bytes);
                log.freeSegment(segment);
            }
            log.segments = next;
            removed = true;
        }
        if (removed) try log.syncNames();
        log.history.trim(log) catch {}; // tried again with the next segment, or second
        // Where the log was full, the worker may be waiting for just that.
        if (log.in_use.load(.acquire) and log.spare.load(.monotonic) == null) {
            log.spare.store(log.reserve, .release);
            log.reserve = null;
        }
    }

    /// Any thread. `trimHistory` has something to do.
    pub fn historyIsDue(log: *const Log) bool {
        return log.history.isDue(log);
    }

    /// Maintenance thread. Removes what has been kept for long enough, or stands where the log needs room. After an error
    /// the call can be repeated.
    pub fn trimHistory(log: *Log) storage_module.Error!void {
        assert(log.stage == .recovered);
        log.maintenance.lock();
        defer log.maintenance.unlock();
        return log.history.trim(log);
    }

    /// Maintenance thread. Why a segment was removed that should have been kept, once; null: none was.
    pub fn takeHistoryFailure(log: *Log) ?storage_module.Error {
        log.maintenance.lock();
        defer log.maintenance.unlock();
        return log.history.takeFailure();
    }

    /// Closes the files and frees the memory; writes nothing. No other thread may be in the log.
    pub fn close(log: *Log) void {
        log.releaseSegments();
        log.storage.closeDirectory(log.directory);
        log.arena.deinit();
        const blocks: [*]align(wal.block_size) [wal.block_size]u8 = @ptrCast(log.header_block);
        log.allocator.free(blocks[0..2]);
        log.allocator.destroy(log);
    }

    fn releaseSegments(log: *Log) void {
        log.takeAdded();
        while (log.segments) |segment| {
            log.segments = segment.next;
            log.freeSegment(segment);
        }
        if (log.spare.swap(null, .acquire)) |segment| log.freeSegment(segment);
        if (log.reserve) |segment| log.freeSegment(segment);
        log.reserve = null;
        log.history.deinit(log);
        log.current.store(null, .monotonic);
        if (log.checkpoint_file) |file| log.storage.close(file);
        log.checkpoint_file = null;
    }
};

const name_bytes = 80;

fn spareName(buffer: *[name_bytes]u8, realtime_ns: u64, id: u64) []const u8 {
    var time: [timestamp_bytes]u8 = undefined;
    return std.fmt.bufPrint(buffer, spare_prefix ++ "{s}-{x:0>16}" ++ segment_suffix, .{ timestamp(&time, realtime_ns), id }) catch unreachable;
}

/// `<first LSN, 20 digits>-<timestamp>.wal`
fn finalName(buffer: *[name_bytes]u8, first_lsn: u64, realtime_ns: u64) []const u8 {
    var time: [timestamp_bytes]u8 = undefined;
    return std.fmt.bufPrint(buffer, "{d:0>20}-{s}" ++ segment_suffix, .{ first_lsn, timestamp(&time, realtime_ns) }) catch unreachable;
}

pub const timestamp_bytes = 26;

/// 20261124T113202.123456789Z
pub fn timestamp(buffer: *[timestamp_bytes]u8, realtime_ns: u64) []const u8 {
    // Up to the year 9999; no clock is trusted.
    const seconds = std.time.epoch.EpochSeconds{ .secs = @min(realtime_ns / std.time.ns_per_s, 253402300799) };
    const day = seconds.getEpochDay();
    const year_day = day.calculateYearDay();
    const month_day = year_day.calculateMonthDay();
    const time = seconds.getDaySeconds();
    return std.fmt.bufPrint(buffer, "{d:0>4}{d:0>2}{d:0>2}T{d:0>2}{d:0>2}{d:0>2}.{d:0>9}Z", .{
        year_day.year,                   month_day.month.numeric(), month_day.day_index + 1,
        time.getHoursIntoDay(),          time.getMinutesIntoHour(), time.getSecondsIntoMinute(),
        realtime_ns % std.time.ns_per_s,
    }) catch unreachable;
}

comptime {
    assert(zero_bytes_max % wal.block_size == 0);
    assert(spare_prefix.len + timestamp_bytes + 1 + 16 + segment_suffix.len <= name_bytes);
    assert(20 + 1 + timestamp_bytes + segment_suffix.len <= name_bytes);
    assert(name_bytes <= storage_module.name_bytes_max);
}

test "timestamps" {
    var buffer: [timestamp_bytes]u8 = undefined;
    try std.testing.expectEqualStrings("19700101T000000.000000000Z", timestamp(&buffer, 0));
    try std.testing.expectEqualStrings("20261124T113202.000000005Z", timestamp(&buffer, 1795519922 * std.time.ns_per_s + 5));
    try std.testing.expectEqualStrings("25540721T233433.709551615Z", timestamp(&buffer, std.math.maxInt(u64)));
}
