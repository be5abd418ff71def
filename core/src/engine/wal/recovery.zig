//! Opening a log directory, whatever state it is in, and bringing its records back.
//!
//! What counts. Segments are put in the order of their first LSNs, then epochs. A segment's records count up to
//! where it was sealed, and up to the next segment's first LSN: whatever lies behind was never acknowledged. Within
//! that, records are delivered in LSN order, each once, from the checkpoint on.
//!
//! What is missing. Everything that says "durable up to here" is believed: the checkpoint, every group's header,
//! each segment's first LSN, each seal. A gap at or below that is a loss: the blocks that should hold it are copied
//! to the quarantine, a receipt names the exact LSNs, and what is good beyond is delivered. A gap above it is where
//! a commit was cut short, or where the power went before several groups were synced, of which the disk may have kept
//! any: the log ends there. Good records behind it are not delivered. Nobody was told that they are durable, and they
//! were made on top of the ones that are lost: what a program wrote comes back up to some point, never with a hole.

const std = @import("std");
const assert = std.debug.assert;
const wal = @import("../../format/wal.zig");
const storage_module = @import("storage.zig");
const reader_module = @import("reader.zig");
const log_module = @import("log.zig");
const mutant = @import("mutant.zig");
const history = @import("history.zig");
const Log = log_module.Log;
const Segment = log_module.Segment;
const Group = log_module.Group;
const SegmentReader = reader_module.SegmentReader;
const Range = reader_module.Range;
const Error = storage_module.Error;

/// survey: identities, fences, ring positions. apply: the same records again, to be applied.
pub const Pass = enum { survey, apply };

/// Gets every record. The payload is valid during the call only. VisitorStopped ends the recovery with that error.
pub const Visitor = struct {
    context: *anyopaque,
    visit: *const fn (context: *anyopaque, pass: Pass, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void,
    /// Hears, after each group, how much of the log has been read, of how much: all passes together, the one before
    /// the first record included.
    progress: ?*const fn (context: *anyopaque, done_bytes: u64, total_bytes: u64) void = null,
};

pub const LsnRange = struct { first: u64, last: u64 };

/// Something about a file of the log that a person may want to know.
pub const Note = struct { name: []const u8, text: []const u8 };

pub const Recovery = struct {
    /// By the checkpoint; records up to here are not delivered.
    applied_lsn: u64 = 0,
    /// Of the delivered records; first_lsn > last_lsn where there was none.
    first_lsn: u64 = 1,
    last_lsn: u64 = 0,
    record_count: u64 = 0,
    payload_bytes: u64 = 0,
    /// Were durable, cannot be read any more; in order, disjoint.
    missing: []const LsnRange = &.{},
    missing_records: u64 = 0,
    /// The file in receipts/ that says the same; "" where nothing is missing, or where it could not be written (a
    /// note says so then).
    receipt_name: []const u8 = "",
    notes: []const Note = &.{},
    notes_dropped: u64 = 0,
};

const notes_max = 256;
/// What one recovery copies to the quarantine at most; beyond it the whole segments are kept instead.
const evidence_bytes_max = 64 << 20;
const copy_bytes = 256 * 1024;
/// Segments of one log. So many would be lost to any configuration.
const candidates_max = 1 << 20;

// ---------------------------------------------------------------------------------------------------------------
// Open
// ---------------------------------------------------------------------------------------------------------------

/// A file of the directory that may be a segment.
const Candidate = struct {
    name: []const u8,
    size_bytes: u64,
    header: reader_module.ParsedHeader = .damaged,
    trailer: reader_module.ParsedHeader = .damaged,
    access: enum {
        granted,
        /// Not this user's, or no file at all.
        refused,
        /// The disk cannot open it.
        broken,
    } = .refused,
    /// The first group of the segment that it is, looked for where first and last block do not agree on that, or the
    /// first says nothing. null: there is none.
    first_group: ?wal.GroupHeader = null,
    /// How many there are, where the ends disagree.
    groups_counted: u64 = 0,

    fn endsDisagree(candidate: *const Candidate) bool {
        if (mutant.is(.segment_ends_not_compared)) return false;
        return candidate.header == .valid and candidate.trailer == .valid and
            candidate.header.valid.segment_id != candidate.trailer.valid.segment_id;
    }

    /// By the first block, else by the last. Where they disagree, the one that more of the groups between them
    /// are of: the other was left by a write that went astray, or by a preparation for a new life that was cut short.
    fn identity(candidate: *const Candidate) ?*const wal.SegmentHeader {
        if (candidate.endsDisagree()) {
            const group = candidate.first_group orelse return &candidate.trailer.valid; // see holdsNothing
            return if (group.segment_id == candidate.header.valid.segment_id) &candidate.header.valid else &candidate.trailer.valid;
        }
        if (candidate.header == .valid) return &candidate.header.valid;
        if (candidate.trailer == .valid) return &candidate.trailer.valid;
        return null;
    }

    /// Nobody can tell whose it is: then nothing in it was ever acknowledged.
    fn holdsNothing(candidate: *const Candidate) bool {
        return candidate.endsDisagree() and candidate.first_group == null;
    }

    fn knownByFirstBlock(candidate: *const Candidate) bool {
        return candidate.header == .valid and candidate.identity() == &candidate.header.valid;
    }
};

const Listing = struct {
    arena: std.mem.Allocator,
    log: *Log,
    candidates: std.ArrayListUnmanaged(Candidate) = .empty,
    history_found: bool = false,
    out_of_memory: bool = false,

    fn visit(context: *anyopaque, name: []const u8, kind: storage_module.EntryKind, size_bytes: u64) void {
        const listing: *Listing = @ptrCast(@alignCast(context));
        if (kind == .directory and std.mem.eql(u8, name, history.directory_name)) listing.history_found = true;
        if (!std.mem.endsWith(u8, name, log_module.segment_suffix)) return;
        if (kind != .file) return note(listing.log, name, "not a regular file: ignored", .{});
        if (listing.candidates.items.len == candidates_max) {
            listing.out_of_memory = true;
            return;
        }
        const owned = listing.arena.dupe(u8, name) catch {
            listing.out_of_memory = true;
            return;
        };
        listing.candidates.append(listing.arena, .{ .name = owned, .size_bytes = size_bytes }) catch {
            listing.out_of_memory = true;
        };
    }
};

/// Reads the checkpoint and the headers of all segments; puts aside what does not belong.
pub fn openLog(log: *Log) log_module.OpenError!void {
    var scratch = std.heap.ArenaAllocator.init(log.allocator);
    defer scratch.deinit();
    const block = log.maintenance_block;

    const stored = try openCheckpoint(log, block);

    var listing = Listing{ .arena = scratch.allocator(), .log = log };
    log.storage.list(log.directory, .{ .context = &listing, .visit = Listing.visit }) catch |err| {
        log.explain("cannot list the log directory {s}: {s}", .{ log.path, @errorName(err) });
        return err;
    };
    if (listing.out_of_memory) return error.OutOfMemory;
    const candidates = listing.candidates.items;
    std.mem.sort(Candidate, candidates, {}, struct {
        fn lessThan(_: void, a: Candidate, b: Candidate) bool {
            return std.mem.lessThan(u8, a.name, b.name);
        }
    }.lessThan);
    for (candidates) |*candidate| try readCandidate(log, candidate, block);
    // Before anything is moved.
    for (candidates) |*candidate| {
        for ([_]reader_module.ParsedHeader{ candidate.header, candidate.trailer }) |parsed| {
            if (parsed == .other_version) return otherVersion(log, candidate.name, parsed.other_version);
        }
    }

    if (stored) |checkpoint| {
        log.uuid = checkpoint.log_uuid;
        log.checkpoint_sequence = checkpoint.sequence;
        log.applied_lsn = checkpoint.applied_lsn;
        log.durable_lsn.store(@max(checkpoint.durable_lsn, checkpoint.applied_lsn), .monotonic);
    } else {
        log.uuid = try mostFrequentUuid(scratch.allocator(), candidates) orelse uuid: {
            var uuid: [16]u8 = undefined;
            log.storage.random(&uuid);
            break :uuid uuid;
        };
    }

    var segments: std.ArrayListUnmanaged(*Segment) = .empty;
    errdefer for (segments.items) |segment| log.freeSegment(segment);
    var by_id: std.AutoHashMapUnmanaged(u64, usize) = .empty;
    for (candidates) |*candidate| {
        const segment = try admit(log, candidate) orelse continue;
        {
            errdefer log.freeSegment(segment);
            try segments.ensureUnusedCapacity(scratch.allocator(), 1);
            const twin = try by_id.getOrPut(scratch.allocator(), segment.id);
            if (!twin.found_existing) {
                twin.value_ptr.* = segments.items.len;
                segments.appendAssumeCapacity(segment);
                continue;
            }
            // A copy of a segment, perhaps cut short, or only its header in a file that is another's: the one whose ends
            // agree stays, else the one that holds more of its groups, else the longer one.
            const other = &segments.items[twin.value_ptr.*];
            const is_better = if (segment.groups_counted != other.*.groups_counted)
                other.*.groups_counted < segment.groups_counted
            else
                other.*.readable_bytes < segment.readable_bytes;
            if (is_better) {
                putAside(log, other.*.name(), "a worse copy of the segment in {s}", .{segment.name()});
                log.freeSegment(other.*);
                other.* = segment;
                continue;
            }
            putAside(log, segment.name(), "a copy of the segment in {s}", .{other.*.name()});
        }
        log.freeSegment(segment);
    }
    std.mem.sort(*Segment, segments.items, {}, struct {
        fn lessThan(_: void, a: *Segment, b: *Segment) bool {
            if (a.first_lsn != b.first_lsn) return a.first_lsn < b.first_lsn;
            return (a.epoch < b.epoch) != mutant.is(.epoch_ignored);
        }
    }.lessThan);

    var link = &log.segments;
    for (segments.items) |segment| {
        link.* = segment;
        link = &segment.next;
        if (segment.sealed_lsn > log.durableLsn()) log.durable_lsn.store(segment.sealed_lsn, .monotonic);
        if (segment.first_lsn - 1 > log.durableLsn()) log.durable_lsn.store(segment.first_lsn - 1, .monotonic);
        log.newest_id = segment.id;
        if (segment.readable_bytes < segment.size_bytes) note(log, segment.name(), "cut short: {d} bytes long, its header says {d}", .{ segment.readable_bytes, segment.size_bytes });
        _ = log.bytes_held.fetchAdd(segment.size_bytes, .monotonic);
    }
    segments.clearRetainingCapacity(); // they are the log's now
    if (listing.history_found) log.history.open(log) catch |err| note(log, history.directory_name, "cannot be read: {s}. What is in it is left alone", .{@errorName(err)});
    if (stored == null) {
        if (log.segments) |oldest| {
            log.applied_lsn = oldest.first_lsn - 1;
            note(log, log_module.checkpoint_name, "cannot be read: everything that the log still holds is applied again, from LSN {d}", .{oldest.first_lsn});
        }
    }
    var each = log.segments;
    while (each) |segment| : (each = segment.next) {
        // Below the checkpoint that is no damage either.
        if (segment.known_by_last_block and upperLsn(segment) > log.applied_lsn) note(log, segment.name(), "its first block is damaged; known by its last block", .{});
    }
    // A new log has an identity of its own from now on.
    log.confirmCheckpoint() catch |err| {
        log.explain("cannot write {s}/{s}: {s}. Is the disk full or read-only?", .{ log.path, log_module.checkpoint_name, @errorName(err) });
        return err;
    };
    log.storage.syncDirectory(log.directory) catch |err| {
        log.explain("cannot sync the log directory {s}: {s}", .{ log.path, @errorName(err) });
        return err;
    };
}

/// The valid block with the higher sequence; null where neither is.
fn openCheckpoint(log: *Log, block: *align(wal.block_size) [wal.block_size]u8) log_module.OpenError!?wal.Checkpoint {
    const name = log_module.checkpoint_name;
    return readCheckpoint(log, name, block) catch |err| {
        if (err != error.LogVersion) log.explain("cannot open or make {s}/{s}: {s}. Check the rights of this user, and whether the disk is full or read-only", .{ log.path, name, @errorName(err) });
        return err;
    };
}

fn readCheckpoint(log: *Log, name: []const u8, block: *align(wal.block_size) [wal.block_size]u8) log_module.OpenError!?wal.Checkpoint {
    log.checkpoint_file = openPatiently(log, name, log.direct) catch |err| file: {
        switch (err) {
            error.NotFound => {},
            error.InvalidArgument, error.IsADirectory, error.TooManySymlinks, error.NoSuchDevice => putAside(log, name, "not a regular file", .{}),
            error.AccessDenied, error.NotPermitted => putAside(log, name, "cannot be opened by this user", .{}),
            else => if (reader_module.isMediaError(err)) putAside(log, name, "the disk cannot open it", .{}) else return err,
        }
        break :file try log.storage.create(log.directory, name, log.direct);
    };
    var newest: ?wal.Checkpoint = null;
    for (0..2) |index| {
        const unreadable = try reader_module.readBlocks(log.storage, log.checkpoint_file.?, block, index * wal.block_size);
        if (unreadable > 0) note(log, name, "block {d} cannot be read", .{index});
        var checkpoint: wal.Checkpoint = undefined;
        @memcpy(std.mem.asBytes(&checkpoint), block[0..@sizeOf(wal.Checkpoint)]);
        if (checkpoint.magic != wal.checkpoint_magic) continue;
        if (checkpoint.header_checksum != checkpoint.computeChecksum() and !mutant.is(.checkpoint_checksum_ignored)) continue;
        if (checkpoint.version != wal.version) return otherVersion(log, name, checkpoint.version);
        if (@max(checkpoint.applied_lsn, checkpoint.durable_lsn) > reader_module.lsn_max) continue;
        if (newest == null or checkpoint.sequence > newest.?.sequence) newest = checkpoint;
    }
    return newest;
}

fn otherVersion(log: *Log, name: []const u8, version: u16) error{LogVersion} {
    log.explain("{s}/{s} is of version {d} of the log format, this is version {d}. Drain the log with the Elgate that wrote it, or give this one another wal.dir", .{ log.path, name, version, wal.version });
    return error.LogVersion;
}

fn readCandidate(log: *Log, candidate: *Candidate, block: *align(wal.block_size) [wal.block_size]u8) log_module.OpenError!void {
    const file = openPatiently(log, candidate.name, for_reading) catch |err| switch (err) {
        // Of somebody else, or gone, or no file at all.
        error.NotFound, error.AccessDenied, error.NotPermitted, error.InvalidArgument, error.TooManySymlinks => return,
        else => {
            if (reader_module.isMediaError(err)) {
                candidate.access = .broken;
                return;
            }
            log.explain("cannot open {s}/{s}: {s}", .{ log.path, candidate.name, @errorName(err) });
            return err;
        },
    };
    defer log.storage.close(file);
    candidate.access = .granted;
    _ = try readExplained(log, candidate.name, file, block, 0);
    candidate.header = reader_module.parseSegmentHeader(block);
    const blocks = candidate.size_bytes / wal.block_size;
    if (blocks * wal.block_size >= reader_module.segment_bytes_min) {
        _ = try readExplained(log, candidate.name, file, block, (blocks - 1) * wal.block_size);
        candidate.trailer = reader_module.parseSegmentHeader(block);
    }
    // Prepared, says its first block: then nothing that it holds counts, and nobody looks.
    if (candidate.header == .valid and !candidate.endsDisagree()) return;
    if (candidate.trailer != .valid) return;
    const last = &candidate.trailer.valid;
    var by_last = Tally{};
    var by_first = Tally{};
    var offset: u64 = wal.block_size;
    while (offset + wal.block_size <= candidate.size_bytes and offset <= reader_module.segment_bytes_max) : (offset += wal.block_size) {
        _ = try readExplained(log, candidate.name, file, block, offset);
        if (reader_module.parseGroupHeader(block, last.segment_id, offset)) |group| {
            if (group.segment_first_lsn != 0 or last.first_lsn != 0) by_last.count(group);
        } else if (candidate.header == .valid) {
            if (reader_module.parseGroupHeader(block, candidate.header.valid.segment_id, offset)) |group| by_first.count(group);
        } else if (by_last.first != null) break;
    }
    // One write that went astray can bring another segment's header and, right behind it, a group.
    const winner = if (by_first.groups > by_last.groups) by_first else by_last;
    candidate.first_group = winner.first;
    candidate.groups_counted = winner.groups;
}

/// Groups of one of two segments that a file may be.
const Tally = struct {
    groups: u64 = 0,
    first: ?wal.GroupHeader = null,

    fn count(tally: *Tally, group: wal.GroupHeader) void {
        tally.groups += 1;
        if (tally.first == null) tally.first = group;
    }
};

/// Segments of earlier lives are read through the page cache, though they are written around it: recovery reads them
/// three times, and the kernel reads ahead.
const for_reading = false;

/// A disk that fails now and then is asked again.
fn openPatiently(log: *Log, name: []const u8, direct: bool) Error!storage_module.File {
    for (1..reader_module.media_attempts_max) |_| {
        return log.storage.open(log.directory, name, direct) catch |err|
            if (reader_module.isMediaError(err)) continue else return err;
    }
    return log.storage.open(log.directory, name, direct);
}

fn readExplained(log: *Log, name: []const u8, file: storage_module.File, block: *align(wal.block_size) [wal.block_size]u8, offset: u64) Error!u64 {
    return reader_module.readBlocks(log.storage, file, block, offset) catch |err| {
        log.explain("cannot read {s}/{s}: {s}", .{ log.path, name, @errorName(err) });
        return err;
    };
}

fn mostFrequentUuid(allocator: std.mem.Allocator, candidates: []const Candidate) error{OutOfMemory}!?[16]u8 {
    var counts: std.AutoHashMapUnmanaged([16]u8, u32) = .empty;
    var best: ?[16]u8 = null;
    var best_count: u32 = 0;
    for (candidates) |*candidate| {
        const header = candidate.identity() orelse continue;
        const entry = try counts.getOrPutValue(allocator, header.log_uuid, 0);
        entry.value_ptr.* += 1;
        if (entry.value_ptr.* > best_count) {
            best = header.log_uuid;
            best_count = entry.value_ptr.*;
        }
    }
    return best;
}

/// The segment that a candidate turns out to be; null where it is none, or not one with records.
fn admit(log: *Log, candidate: *const Candidate) log_module.OpenError!?*Segment {
    const name = candidate.name;
    switch (candidate.access) {
        .granted => {},
        .refused => {
            putAside(log, name, "cannot be opened by this user", .{});
            return null;
        },
        .broken => {
            // Where it is: a repair of the file system may bring it back.
            note(log, name, "the disk cannot open it: ignored, left where it is", .{});
            return null;
        },
    }
    const header = candidate.identity() orelse {
        if (std.mem.startsWith(u8, name, log_module.spare_prefix) and isUnwritten(candidate)) {
            // The header is written, and synced, before anything else is: this one never got so far.
            log.storage.unlink(log.directory, name) catch |err| note(log, name, "left over from an unfinished preparation, cannot be removed: {s}", .{@errorName(err)});
            return null;
        }
        putAside(log, name, "{s}", .{if (candidate.size_bytes == 0) "empty" else "not a segment of a log, or damaged at both ends"});
        return null;
    };
    if (!std.mem.eql(u8, &header.log_uuid, &log.uuid)) {
        putAside(log, name, "a segment of another log ({x})", .{&header.log_uuid});
        return null;
    }
    if (header.epoch > log.epoch.load(.monotonic)) log.epoch.store(header.epoch, .monotonic);

    const segment = try log.allocator.create(Segment);
    errdefer log.freeSegment(segment);
    segment.* = .{
        .id = header.segment_id,
        .predecessor_id = header.predecessor_id,
        .epoch = header.epoch,
        .size_bytes = header.size_bytes,
        .readable_bytes = @min(header.size_bytes, candidate.size_bytes),
        .created_realtime_ns = header.created_realtime_ns,
        .first_lsn = header.first_lsn,
        .sealed_lsn = header.sealed_lsn,
        .sealed_realtime_ns = header.sealed_realtime_ns,
        .zeroed_bytes = .init(header.size_bytes),
        .retired = .init(true),
        .tidied = true,
    };
    segment.setName(name);
    segment.known_by_first_block = candidate.trailer != .valid;
    if (candidate.endsDisagree()) segment.groups_counted = candidate.groups_counted;
    if (!candidate.knownByFirstBlock()) {
        // The last block is mostly as it was when the segment was prepared. What became of it, its groups say.
        if (candidate.first_group) |group| {
            if (segment.first_lsn == 0) {
                segment.first_lsn = group.segment_first_lsn;
                segment.epoch = group.segment_epoch;
            }
            // Another one's header there that is in no use yet is no damage: a preparation for a new life was cut short.
            segment.known_by_last_block = candidate.header != .valid or candidate.header.valid.first_lsn != 0;
            log.epoch.store(@max(log.epoch.load(.monotonic), segment.epoch), .monotonic);
        }
    }
    if (segment.first_lsn == 0 or candidate.holdsNothing()) {
        admitSpare(log, segment);
        return null;
    }
    return segment;
}

fn isUnwritten(candidate: *const Candidate) bool {
    return candidate.size_bytes == 0 or
        (candidate.header == .zeros and (candidate.trailer == .zeros or candidate.size_bytes < reader_module.segment_bytes_min));
}

/// A prepared segment of an earlier life: one is taken over (and prepared again), others go.
fn admitSpare(log: *Log, segment: *Segment) void {
    if (log.reserve == null and segment.size_bytes == log.options.segment_bytes) {
        _ = log.bytes_held.fetchAdd(segment.size_bytes, .monotonic);
        log.reserve = segment;
        return;
    }
    log.storage.unlink(log.directory, segment.name()) catch |err| note(log, segment.name(), "prepared and not needed, cannot be removed: {s}", .{@errorName(err)});
    log.freeSegment(segment);
}

// ---------------------------------------------------------------------------------------------------------------
// Recover
// ---------------------------------------------------------------------------------------------------------------

pub fn recover(log: *Log, visitor: Visitor) log_module.RecoverError!void {
    var window_bytes = SegmentReader.windowBytes(log.options.segment_bytes);
    var each = log.segments;
    while (each) |segment| : (each = segment.next) window_bytes = @max(window_bytes, SegmentReader.windowBytes(segment.size_bytes));
    const window = try log.allocator.alignedAlloc(u8, .fromByteUnits(wal.block_size), window_bytes);
    defer log.allocator.free(window);
    const copy_buffer = try log.allocator.alignedAlloc(u8, .fromByteUnits(wal.block_size), copy_bytes);
    defer log.allocator.free(copy_buffer);
    var walk = Walk{ .log = log, .window = window, .copy_buffer = copy_buffer, .visitor = visitor };
    defer walk.deinit();
    each = log.segments;
    while (each) |segment| : (each = segment.next) {
        if (upperLsn(segment) > log.applied_lsn) walk.pass_bytes += SegmentReader.groupsEnd(segment.size_bytes, segment.readable_bytes);
    }

    log.recovery.applied_lsn = log.applied_lsn;
    try walk.findDurable();
    takeOverSpare(log);
    try walk.rewriteTail();

    try walk.run(.survey);
    log.recovery.last_lsn = walk.expected - 1;
    try walk.run(.apply);

    const next_lsn = @max(log.recovery.last_lsn, walk.durable_lsn) + 1;
    assert(next_lsn - 1 >= log.durableLsn());
    log.startBehind(next_lsn - 1);
    var next = log.segments;
    while (next) |segment| : (next = segment.next) {
        if (segment == log.current.load(.monotonic)) continue;
        segment.last_lsn.store(@min(upperLsn(segment), next_lsn - 1), .monotonic);
        if (segment.sealed_lsn == 0 and !segment.evidence) log.sealOld(segment);
    }
    try walk.finishMissing();
}

/// The last LSN that counts in a segment.
fn upperLsn(segment: *const Segment) u64 {
    var upper: u64 = if (segment.sealed_lsn != 0) segment.sealed_lsn else std.math.maxInt(u64);
    if (mutant.is(.nothing_voided)) return upper;
    if (segment.next) |next| upper = @min(upper, next.first_lsn - 1);
    return upper;
}

fn takeOverSpare(log: *Log) void {
    const left = log.reserve orelse return;
    log.reserve = null;
    log.spare.store(log.reuse(left, log.directory), .release);
}

const Suspect = struct { segment: *Segment, range: Range };

const Walk = struct {
    log: *Log,
    window: []align(wal.block_size) u8,
    copy_buffer: []align(wal.block_size) u8,
    visitor: Visitor,
    /// Of what is read in one pass, and how far that has come in all passes.
    pass_bytes: u64 = 0,
    done_bytes: u64 = 0,
    /// Read around the page cache what can be.
    around_cache: bool = false,
    /// Everything up to here was durable once.
    durable_lsn: u64 = 0,
    /// The next LSN that is to be delivered.
    expected: u64 = 0,
    missing: std.ArrayListUnmanaged(LsnRange) = .empty,
    /// Where the records may have been that have not turned up since the last one that was delivered.
    suspects: std.ArrayListUnmanaged(Suspect) = .empty,
    evidence_names: std.ArrayListUnmanaged([]const u8) = .empty,
    evidence_bytes: u64 = 0,

    fn deinit(walk: *Walk) void {
        walk.missing.deinit(walk.log.allocator);
        walk.suspects.deinit(walk.log.allocator);
        walk.evidence_names.deinit(walk.log.allocator);
    }

    const Opened = struct { reader: SegmentReader, close: bool };

    fn open(walk: *Walk, segment: *Segment) Error!?Opened {
        const log = walk.log;
        var close = false;
        const file = segment.file orelse file: {
            close = true;
            break :file openPatiently(log, segment.name(), if (walk.around_cache) log.direct else for_reading) catch |err| switch (err) {
                error.NotFound => return null,
                else => {
                    log.explain("cannot open {s}/{s}: {s}", .{ log.path, segment.name(), @errorName(err) });
                    return err;
                },
            };
        };
        var reader = SegmentReader.init(log.storage, file, segment.id, segment.size_bytes, segment.readable_bytes, walk.window);
        reader.lsn_floor = segment.first_lsn;
        if (segment.scanned_end) |end| reader.end = @min(reader.end, end);
        return .{ .reader = reader, .close = close };
    }

    /// The highest LSN that anything in the log says is durable.
    fn findDurable(walk: *Walk) log_module.RecoverError!void {
        const log = walk.log;
        walk.durable_lsn = log.durableLsn();
        var next = log.segments;
        while (next) |segment| : (next = segment.next) {
            if (upperLsn(segment) <= log.applied_lsn) continue;
            var opened = try walk.open(segment) orelse continue;
            defer if (opened.close) log.storage.close(opened.reader.file);
            const before = walk.done_bytes;
            defer walk.done_bytes = before + SegmentReader.groupsEnd(segment.size_bytes, segment.readable_bytes);
            while (try walk.nextGroup(&opened.reader, segment)) |group| {
                walk.tellProgress(before + opened.reader.position);
                walk.durable_lsn = @max(walk.durable_lsn, group.header.durable_lsn);
            }
            // Mostly zeros lie behind; they need not be read again.
            segment.scanned_end = opened.reader.position;
        }
        log.startBehind(walk.durable_lsn);
    }

    /// Records above what is known to be durable: the daemon was stopped before it had synced them, or in their commit,
    /// or the commit failed. They may lie in a cache, or in pages that the kernel has given up writing: syncing them
    /// proves nothing, so they are written anew, before anybody hears of them. They count where they lie until all of
    /// them are durable in the new place.
    fn rewriteTail(walk: *Walk) log_module.RecoverError!void {
        const log = walk.log;
        const tail = try walk.findTail() orelse return;
        if (mutant.is(.tail_only_synced)) {
            const opened = try walk.open(tail.segment) orelse return;
            defer if (opened.close) log.storage.close(opened.reader.file);
            return log.storage.sync(opened.reader.file);
        }
        const memory = try log.allocator.alignedAlloc(u8, .fromByteUnits(wal.block_size), wal.group_bytes_max);
        defer log.allocator.free(memory);
        walk.moveTail(tail, memory) catch |first_error| {
            log.abandonMove();
            // Once more, somewhere else, before the start is refused.
            walk.moveTail(tail, memory) catch |err| {
                log.abandonMove();
                return walk.syncTail(first_error, err);
            };
        };
        // Said in the checkpoint too: a daemon that is started again and again does this once, not each time.
        log.writeCheckpoint(log.applied_lsn) catch |err| {
            log.explain("cannot write {s}/{s}: {s}. Mend the disk, and start again", .{ log.path, log_module.checkpoint_name, @errorName(err) });
            return err;
        };
        walk.durable_lsn = log.durableLsn();
        log.takeAdded();
        const current = log.current.load(.monotonic).?;
        current.scanned_end = current.write_offset;
    }

    /// `bytes`: of its groups, in whole blocks.
    const Tail = struct { segment: *Segment, first_lsn: u64, last_lsn: u64, bytes: u64 };

    /// The records behind the last durable one, as far as they follow one another.
    const TailReader = struct {
        walk: *Walk,
        expected: u64,
        next_segment: ?*Segment,
        segment: *Segment = undefined,
        upper: u64 = 0,
        opened: ?Opened = null,
        found: ?reader_module.FoundGroup = null,
        records: reader_module.RecordIterator = undefined,

        const Item = struct { header: *const wal.RecordHeader, payload: []const u8, group: u64 };

        fn init(walk: *Walk) TailReader {
            return .{ .walk = walk, .expected = walk.durable_lsn + 1, .next_segment = walk.log.segments };
        }

        fn deinit(tail: *TailReader) void {
            tail.closeSegment();
        }

        fn closeSegment(tail: *TailReader) void {
            if (tail.opened) |opened| if (opened.close) tail.walk.log.storage.close(opened.reader.file);
            tail.opened = null;
            tail.found = null;
        }

        /// Valid until the next call. null: the tail ends here.
        fn next(tail: *TailReader) log_module.RecoverError!?Item {
            while (true) {
                if (tail.found) |found| {
                    while (tail.records.next()) |item| switch (item) {
                        .bad => |bad| if (bad.last_lsn >= tail.expected) return null,
                        .good => |good| {
                            if (good.header.lsn < tail.expected) continue;
                            if (good.header.lsn != tail.expected or good.header.lsn > tail.upper) return null;
                            tail.expected += 1;
                            return .{ .header = good.header, .payload = good.payload, .group = found.header.first_lsn };
                        },
                    };
                    tail.found = null;
                }
                if (tail.opened) |*opened| {
                    if (try tail.walk.nextGroup(&opened.reader, tail.segment)) |found| {
                        if (found.lastLsn() < tail.expected) continue;
                        tail.records = try opened.reader.records(found);
                        tail.found = found;
                        continue;
                    }
                    tail.closeSegment();
                }
                tail.segment = tail.next_segment orelse return null;
                tail.next_segment = tail.segment.next;
                tail.upper = upperLsn(tail.segment);
                if (tail.upper < tail.expected) continue;
                tail.opened = try tail.walk.open(tail.segment);
            }
        }
    };

    fn findTail(walk: *Walk) log_module.RecoverError!?Tail {
        var reader = TailReader.init(walk);
        defer reader.deinit();
        var tail: ?Tail = null;
        var group_lsn: u64 = 0;
        while (try reader.next()) |item| {
            if (tail == null) tail = .{ .segment = reader.segment, .first_lsn = item.header.lsn, .last_lsn = 0, .bytes = 0 };
            tail.?.last_lsn = item.header.lsn;
            if (item.group != group_lsn) tail.?.bytes += reader.found.?.paddedBytes();
            group_lsn = item.group;
        }
        return tail;
    }

    /// Into a segment of its own, group by group.
    fn moveTail(walk: *Walk, tail: Tail, memory: []align(wal.block_size) u8) log_module.RecoverError!void {
        const log = walk.log;
        var reader = TailReader.init(walk);
        defer reader.deinit();
        var group = Group.init(memory);
        var group_lsn: u64 = 0;
        while (try reader.next()) |item| {
            if (item.group != group_lsn) {
                if (group_lsn != 0) try walk.moveGroup(&group, tail.bytes);
                group_lsn = item.group;
                group.begin(log);
                // It had room in its segment; smaller ones may have been configured since.
                group.capacity_bytes = @intCast(memory.len);
            }
            const slot = group.append(fieldsOf(item.header)).?; // it was a group of at most this size
            assert(slot.lsn == item.header.lsn);
            @memcpy(slot.payload, item.payload);
        }
        assert(group.lastLsn() == tail.last_lsn);
        try walk.moveGroup(&group, tail.bytes);
        log.finishMove() catch |err| return storageError(err);
    }

    fn moveGroup(walk: *Walk, group: *Group, total_bytes: u64) Error!void {
        walk.log.moveGroup(group, total_bytes) catch |err| return storageError(err);
    }

    fn storageError(err: log_module.CommitError) Error {
        return switch (err) {
            error.LogFull => unreachable, // recovery goes beyond the limit
            else => |other| other,
        };
    }

    /// The tail could not be moved. Where a write has failed, a segment that was put to use may void the tail where it
    /// lies now. Where none has, there is just no room, and what the disk itself gives back needs only be synced: read
    /// around the page cache, which may hold what the kernel has given up writing.
    fn syncTail(walk: *Walk, first_error: log_module.RecoverError, last_error: log_module.RecoverError) log_module.RecoverError!void {
        const log = walk.log;
        if (last_error == error.OutOfMemory or last_error == error.VisitorStopped) return last_error;
        const tail = try walk.findTail() orelse return last_error;
        const may_sync = log.added.load(.monotonic) == null and log.direct and isFull(first_error) and isFull(last_error);
        if (!may_sync) return walk.refuse(tail, last_error);
        walk.around_cache = true;
        defer walk.around_cache = false;
        const on_disk = try walk.findTail() orelse return walk.refuse(tail, last_error);
        if (on_disk.last_lsn != tail.last_lsn) return walk.refuse(tail, last_error);
        note(log, tail.segment.name(), "records {d} to {d} were synced where they lie: {s} for another segment", .{ tail.first_lsn, tail.last_lsn, @errorName(last_error) });
        const opened = try walk.open(tail.segment) orelse return;
        defer if (opened.close) log.storage.close(opened.reader.file);
        log.storage.sync(opened.reader.file) catch |sync_err| {
            log.explain("cannot sync {s}/{s}: {s}. Mend the disk, and start again", .{ log.path, tail.segment.name(), @errorName(sync_err) });
            return sync_err;
        };
    }

    fn refuse(walk: *Walk, tail: Tail, err: log_module.RecoverError) log_module.RecoverError {
        const log = walk.log;
        log.explain("cannot write to {s}: {s}. The last records, {d} to {d}, must be written anew before anything else: free space for a segment of {d} bytes, or mend the disk, and start again", .{ log.path, @errorName(err), tail.first_lsn, tail.last_lsn, @max(log.options.segment_bytes, tail.bytes + 2 * wal.block_size) });
        return err;
    }

    fn isFull(err: log_module.RecoverError) bool {
        return err == error.NoSpace or err == error.QuotaExceeded;
    }

    fn nextGroup(walk: *Walk, reader: *SegmentReader, segment: *Segment) Error!?reader_module.FoundGroup {
        defer if (reader.unreadable_blocks > 0) {
            segment.evidence = true;
        };
        return reader.next() catch |err| {
            walk.log.explain("cannot read {s}/{s}: {s}", .{ walk.log.path, segment.name(), @errorName(err) });
            return err;
        };
    }

    /// Delivers everything once.
    fn run(walk: *Walk, pass: Pass) log_module.RecoverError!void {
        const log = walk.log;
        walk.expected = log.applied_lsn + 1;
        walk.suspects.clearRetainingCapacity();
        if (pass == .survey) log.recovery.first_lsn = walk.expected;
        var next = log.segments;
        while (next) |segment| : (next = segment.next) {
            const upper = upperLsn(segment);
            if (upper < walk.expected) continue;
            var opened = try walk.open(segment) orelse continue;
            defer if (opened.close) log.storage.close(opened.reader.file);
            const going_on = try walk.runSegment(pass, segment, upper, &opened.reader);
            if (opened.reader.unreadable_blocks > 0) segment.evidence = true;
            if (!going_on) return;
        }
        if (walk.expected <= walk.durable_lsn) _ = try walk.gap(pass, walk.durable_lsn);
    }

    /// false: cut here, nothing beyond counts.
    fn runSegment(walk: *Walk, pass: Pass, segment: *Segment, upper: u64, reader: *SegmentReader) log_module.RecoverError!bool {
        const log = walk.log;
        const before = walk.done_bytes;
        defer walk.done_bytes = before + SegmentReader.groupsEnd(segment.size_bytes, segment.readable_bytes);
        while (try walk.nextGroup(reader, segment)) |group| {
            walk.tellProgress(before + reader.position);
            if (group.skipped.length > 0) try walk.suspect(segment, group.skipped);
            if (group.lastLsn() < walk.expected) continue;
            if (group.header.first_lsn > upper) return true;
            var records = try reader.records(group);
            while (records.next()) |item| switch (item) {
                .bad => try walk.suspect(segment, .{ .offset = group.offset, .length = group.paddedBytes() }),
                .good => |good| {
                    const lsn = good.header.lsn;
                    if (lsn > upper) return true;
                    if (lsn < walk.expected) continue;
                    if (lsn > walk.expected and !try walk.gap(pass, lsn - 1)) return false;
                    assert(lsn == walk.expected);
                    try walk.visitor.visit(walk.visitor.context, pass, good.header, good.payload);
                    walk.expected = lsn + 1;
                    walk.suspects.clearRetainingCapacity();
                    if (pass == .survey) {
                        log.recovery.record_count += 1;
                        log.recovery.payload_bytes += good.payload.len;
                        if (segment != log.current.load(.monotonic)) segment.noteRing(good.header.ring_uuid, good.header.position);
                    }
                },
            };
        }
        if (walk.expected <= @min(upper, walk.durable_lsn)) {
            const end = SegmentReader.groupsEnd(segment.size_bytes, segment.readable_bytes);
            const tail = Range{ .offset = reader.position, .length = end -| reader.position };
            try walk.suspect(segment, try walk.trim(reader, tail));
        }
        return true;
    }

    fn tellProgress(walk: *Walk, done_bytes: u64) void {
        const passes = 3;
        const total_bytes = passes * walk.pass_bytes;
        // The tail that was written anew is read too, and was not counted.
        if (walk.visitor.progress) |progress| progress(walk.visitor.context, @min(done_bytes, total_bytes), total_bytes);
    }

    fn suspect(walk: *Walk, segment: *Segment, range: Range) log_module.RecoverError!void {
        if (range.length == 0) return;
        if (walk.suspects.items.len > 0) {
            const last = &walk.suspects.items[walk.suspects.items.len - 1];
            if (last.segment == segment and last.range.offset + last.range.length >= range.offset) {
                const end = @max(last.range.offset + last.range.length, range.offset + range.length);
                last.range.length = end - last.range.offset;
                return;
            }
        }
        try walk.suspects.append(walk.log.allocator, .{ .segment = segment, .range = range });
    }

    /// Without the zeros at its end, which nothing was ever written to.
    fn trim(walk: *Walk, reader: *SegmentReader, range: Range) Error!Range {
        var offset = range.offset;
        var end = range.offset;
        while (offset < range.offset + range.length) {
            const count: usize = @intCast(@min(walk.copy_buffer.len, range.offset + range.length - offset));
            const bytes = walk.copy_buffer[0..count];
            reader.unreadable_blocks += try reader_module.readBlocks(walk.log.storage, reader.file, bytes, offset);
            var block: usize = 0;
            while (block < count) : (block += wal.block_size) {
                if (!std.mem.allEqual(u8, bytes[block..][0..wal.block_size], 0)) end = offset + block + wal.block_size;
            }
            offset += count;
        }
        return .{ .offset = range.offset, .length = end - range.offset };
    }

    /// Records from `expected` to `last_lsn` have not turned up. false: they were never acknowledged, and the log
    /// ends here.
    fn gap(walk: *Walk, pass: Pass, last_lsn: u64) log_module.RecoverError!bool {
        const first_lsn = walk.expected;
        assert(first_lsn <= last_lsn);
        if (mutant.is(.damage_taken_for_tail)) return false;
        const lost_to = @min(last_lsn, walk.durable_lsn);
        if (first_lsn <= lost_to) {
            try walk.missing.append(walk.log.allocator, .{ .first = first_lsn - @intFromBool(mutant.is(.receipt_too_wide)), .last = lost_to });
            walk.expected = lost_to + 1;
            if (pass == .survey) for (walk.suspects.items) |item| try walk.copyAside(item.segment, item.range);
        }
        walk.suspects.clearRetainingCapacity();
        if (mutant.is(.hole_ignored)) {
            walk.expected = last_lsn + 1;
            return true;
        }
        return lost_to == last_lsn;
    }

    /// Evidence for people. Where it cannot be copied, the segment is kept.
    fn copyAside(walk: *Walk, segment: *Segment, range: Range) log_module.RecoverError!void {
        const log = walk.log;
        if (walk.evidence_bytes + range.length > evidence_bytes_max) {
            segment.evidence = true;
            return;
        }
        walk.evidence_bytes += range.length;
        var name_buffer: [storage_module.name_bytes_max + 64]u8 = undefined;
        const name = std.fmt.bufPrint(&name_buffer, "{s}.{d}+{d}", .{ segment.name(), range.offset, range.length }) catch unreachable;
        walk.copyBlocks(segment, range, name) catch |err| switch (err) {
            error.AlreadyExists => {}, // by an earlier recovery
            else => {
                segment.evidence = true;
                note(log, segment.name(), "{d} bytes at {d} are damaged and could not be copied to the quarantine: {s}", .{ range.length, range.offset, @errorName(err) });
                return;
            },
        };
        try walk.evidence_names.append(log.allocator, try log.arena.allocator().dupe(u8, name));
    }

    fn copyBlocks(walk: *Walk, segment: *Segment, range: Range, name: []const u8) Error!void {
        const log = walk.log;
        const from = segment.file orelse try log.storage.open(log.directory, segment.name(), log.direct);
        defer if (segment.file == null) log.storage.close(from);
        const directory = try log.storage.openDirectory(log.directory, log_module.quarantine_name);
        defer log.storage.closeDirectory(directory);
        const to = try log.storage.create(directory, name, log.direct);
        defer log.storage.close(to);
        errdefer log.storage.unlink(directory, name) catch {};
        var done: u64 = 0;
        while (done < range.length) {
            const count: usize = @intCast(@min(walk.copy_buffer.len, range.length - done));
            const bytes = walk.copy_buffer[0..count];
            const unreadable = try reader_module.readBlocks(log.storage, from, bytes, range.offset + done);
            if (unreadable > 0) segment.evidence = true;
            try log.storage.write(to, &.{bytes}, done, false);
            done += count;
        }
        try log.storage.sync(to);
        try log.storage.syncDirectory(directory);
    }

    /// Both passes together, in order, without doubles; and the receipt.
    fn finishMissing(walk: *Walk) log_module.RecoverError!void {
        const log = walk.log;
        const recovery = &log.recovery;
        std.mem.sort(LsnRange, walk.missing.items, {}, struct {
            fn lessThan(_: void, a: LsnRange, b: LsnRange) bool {
                return a.first < b.first;
            }
        }.lessThan);
        var merged: std.ArrayListUnmanaged(LsnRange) = .empty;
        for (walk.missing.items) |range| {
            if (merged.items.len > 0) {
                const last = &merged.items[merged.items.len - 1];
                if (range.first <= last.last + 1) {
                    last.last = @max(last.last, range.last);
                    continue;
                }
            }
            try merged.append(log.arena.allocator(), range);
        }
        recovery.missing = merged.items;
        for (merged.items) |range| recovery.missing_records += range.last - range.first + 1;
        if (recovery.missing_records == 0) return;

        const first = merged.items[0].first;
        const last = merged.items[merged.items.len - 1].last;
        const name = try std.fmt.allocPrint(log.arena.allocator(), "lost-{d}-{d}-{d}.json", .{ first, last, recovery.missing_records });
        if (walk.writeReceipt(name)) {
            recovery.receipt_name = name;
        } else |err| switch (err) {
            error.OutOfMemory => return error.OutOfMemory,
            else => note(log, name, "this receipt could not be written: {s}", .{@errorName(err)}),
        }
    }

    fn writeReceipt(walk: *Walk, name: []const u8) (Error || error{OutOfMemory})!void {
        const log = walk.log;
        const recovery = &log.recovery;
        var time: [log_module.timestamp_bytes]u8 = undefined;
        const text = try std.json.Stringify.valueAlloc(log.allocator, .{
            .what = "records that were durable and cannot be read any more",
            .log = log.path,
            .log_uuid = &std.fmt.bytesToHex(log.uuid, .lower),
            .found = log_module.timestamp(&time, log.storage.realtimeNs()),
            .missing_records = recovery.missing_records,
            .missing = recovery.missing,
            .quarantined = walk.evidence_names.items,
            .what_to_do = "The target files lack these records. The blocks that held them are in quarantine/. Check the disk, and restore the records from their source.",
        }, .{ .whitespace = .indent_2 });
        defer log.allocator.free(text);
        const directory = try log.storage.openDirectory(log.directory, log_module.receipts_name);
        defer log.storage.closeDirectory(directory);
        const unfinished_name = ".unfinished";
        log.storage.unlink(directory, unfinished_name) catch |err| if (err != error.NotFound) return err;
        const file = try log.storage.create(directory, unfinished_name, false);
        defer log.storage.close(file);
        try log.storage.write(file, &.{ text, "\n" }, 0, false);
        try log.storage.sync(file);
        log.storage.rename(directory, unfinished_name, directory, name) catch |err| switch (err) {
            // The same loss was found by an earlier start; its receipt stands.
            error.AlreadyExists => try log.storage.unlink(directory, unfinished_name),
            else => return err,
        };
        try log.storage.syncDirectory(directory);
    }
};

fn fieldsOf(header: *const wal.RecordHeader) log_module.Fields {
    return .{
        .kind = @enumFromInt(header.kind),
        .ring_uuid = header.ring_uuid,
        .position = header.position,
        .file_id = header.file_id,
        .offset = header.offset,
        .length_bytes = header.length_bytes,
        .payload_checksum = header.payload_checksum,
        .argument = header.argument,
        .time_ns = header.time_ns,
    };
}

// ---------------------------------------------------------------------------------------------------------------
// Quarantine and notes
// ---------------------------------------------------------------------------------------------------------------

/// Moves a file of the log directory to the quarantine, under its own name or, where that is taken, a number more.
pub fn quarantine(log: *Log, name: []const u8) Error!void {
    const directory = try log.storage.openDirectory(log.directory, log_module.quarantine_name);
    defer log.storage.closeDirectory(directory);
    const attempts_max = 1000;
    for (0..attempts_max) |attempt| {
        var buffer: [storage_module.name_bytes_max + 8]u8 = undefined;
        const new_name = if (attempt == 0) name else std.fmt.bufPrint(&buffer, "{s}.{d}", .{ name, attempt }) catch unreachable;
        log.storage.rename(log.directory, name, directory, new_name) catch |err| switch (err) {
            error.AlreadyExists => continue,
            else => return err,
        };
        break;
    } else return error.AlreadyExists;
    try log.storage.syncDirectory(directory);
    try log.storage.syncDirectory(log.directory);
}

fn putAside(log: *Log, name: []const u8, comptime reason: []const u8, arguments: anytype) void {
    if (quarantine(log, name)) {
        note(log, name, reason ++ ": moved to quarantine/", arguments);
    } else |err| {
        note(log, name, reason ++ ": ignored (it cannot be moved to quarantine/: {s})", arguments ++ .{@errorName(err)});
    }
}

/// Dropped, and counted, where there are too many, or no memory.
fn note(log: *Log, name: []const u8, comptime format: []const u8, arguments: anytype) void {
    const arena = log.arena.allocator();
    const recovery = &log.recovery;
    if (recovery.notes.len == notes_max) {
        recovery.notes_dropped += 1;
        return;
    }
    // One place for all of them, taken at the first.
    if (recovery.notes.len == 0) {
        const all = arena.alloc(Note, notes_max) catch return dropNote(recovery);
        recovery.notes = all[0..0];
    }
    const text = std.fmt.allocPrint(arena, format, arguments) catch return dropNote(recovery);
    const owned_name = arena.dupe(u8, name) catch return dropNote(recovery);
    const count = recovery.notes.len;
    const all: [*]Note = @constCast(recovery.notes.ptr);
    all[count] = .{ .name = owned_name, .text = text };
    recovery.notes = all[0 .. count + 1];
}

fn dropNote(recovery: *Recovery) void {
    recovery.notes_dropped += 1;
}
