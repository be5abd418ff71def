//! One commit of a log, built in place: the worker copies payloads from the ring straight into the memory that
//! goes to disk, and, once the commit is durable, writes the target files from that same memory. Worker thread
//! only; the log is written by one thread.
//!
//! A group takes the LSNs behind the last one that is in the log, so at most one group of a log holds records that are
//! not in it. A group whose commit failed may be committed again as it is, or begun anew: its LSNs were
//! never acknowledged, and are given out again.

const std = @import("std");
const assert = std.debug.assert;
const wal = @import("../../format/wal.zig");
const Log = @import("log.zig").Log;

/// What the producer says about a record. The log adds LSN, segment and its own checksum.
pub const Fields = struct {
    kind: wal.Kind,
    /// Zeros for records of the daemon's own.
    ring_uuid: [16]u8 = @splat(0),
    position: u64 = 0,
    file_id: u64 = 0,
    offset: u64 = 0,
    /// Of the payload; at most wal.payload_bytes_max.
    length_bytes: u32 = 0,
    /// CRC32C of the payload (0 for an empty one).
    payload_checksum: u32 = 0,
    argument: u32 = 0,
    time_ns: u64 = 0,
};

/// A reserved record: `payload` is to be filled with exactly its length before the commit.
pub const Slot = struct {
    header: *wal.RecordHeader,
    payload: []u8,
    lsn: u64,
};

pub const Group = struct {
    memory: []align(wal.block_size) u8,
    log: ?*Log,
    first_lsn: u64,
    record_count: u32,
    /// From the group header's first byte to the end of the last record.
    length_bytes: u32,
    /// What memory and the log's segments have room for, a multiple of the block size.
    capacity_bytes: u32,
    /// Where the last record starts, or 0 where it cannot be cancelled.
    last_record_offset: u32,

    /// `memory`: a multiple of 4096 bytes, aligned to that, at most wal.group_bytes_max; the caller keeps it until
    /// the group's records are not needed any more.
    pub fn init(memory: []align(wal.block_size) u8) Group {
        assert(memory.len >= wal.block_size);
        assert(memory.len % wal.block_size == 0);
        assert(memory.len <= wal.group_bytes_max);
        return .{
            .memory = memory,
            .log = null,
            .first_lsn = 0,
            .record_count = 0,
            .length_bytes = @sizeOf(wal.GroupHeader),
            .capacity_bytes = @intCast(memory.len),
            .last_record_offset = 0,
        };
    }

    /// Empties the group and gives it the log's next LSNs. What it held before is forgotten.
    pub fn begin(group: *Group, log: *Log) void {
        group.* = .init(group.memory);
        group.log = log;
        group.first_lsn = log.nextLsn();
        group.capacity_bytes = @intCast(@min(group.memory.len, log.groupBytesMax()));
    }

    /// Whether a record with a payload of this length has room.
    pub fn fits(group: *const Group, length_bytes: u32) bool {
        assert(length_bytes <= wal.payload_bytes_max);
        return wal.recordBytes(length_bytes) <= group.capacity_bytes - group.length_bytes;
    }

    /// No room for a record of the greatest length: commit before more is taken.
    pub fn isFull(group: *const Group) bool {
        return !group.fits(wal.payload_bytes_max);
    }

    /// Reserves the next record, or null where it has no room (commit, then begin again). The payload's bytes
    /// are whatever was there before, until the caller fills them.
    pub fn append(group: *Group, fields: Fields) ?Slot {
        assert(group.log != null);
        if (!group.fits(fields.length_bytes)) return null;
        const offset = group.length_bytes;
        const header: *wal.RecordHeader = @ptrCast(@alignCast(group.memory[offset..][0..@sizeOf(wal.RecordHeader)]));
        header.* = .{
            .header_checksum = 0,
            .magic = wal.record_magic,
            .segment_id = 0,
            .lsn = group.first_lsn + group.record_count,
            .ring_uuid = fields.ring_uuid,
            .position = fields.position,
            .file_id = fields.file_id,
            .offset = fields.offset,
            .length_bytes = fields.length_bytes,
            .payload_checksum = fields.payload_checksum,
            .kind = @intFromEnum(fields.kind),
            .version = wal.version,
            .argument = fields.argument,
            .time_ns = fields.time_ns,
            .reserved = @splat(0),
        };
        const room = group.memory[offset..][@sizeOf(wal.RecordHeader)..wal.recordBytes(fields.length_bytes)];
        @memset(room[fields.length_bytes..], 0);
        group.length_bytes += wal.recordBytes(fields.length_bytes);
        group.record_count += 1;
        group.last_record_offset = offset;
        return .{ .header = header, .payload = room[0..fields.length_bytes], .lsn = header.lsn };
    }

    /// Takes the last appended record back (its payload turned out to be wrong). Once per append.
    pub fn cancelLast(group: *Group) void {
        assert(group.last_record_offset != 0);
        assert(group.record_count > 0);
        group.length_bytes = group.last_record_offset;
        group.record_count -= 1;
        group.last_record_offset = 0;
    }

    pub fn recordCount(group: *const Group) u32 {
        return group.record_count;
    }

    pub fn isEmpty(group: *const Group) bool {
        return group.record_count == 0;
    }

    pub fn lastLsn(group: *const Group) u64 {
        assert(group.record_count > 0);
        return group.first_lsn + group.record_count - 1;
    }

    /// Bytes that the commit writes: a multiple of the block size.
    pub fn commitBytes(group: *const Group) u32 {
        return std.mem.alignForward(u32, group.length_bytes, wal.block_size);
    }

    /// The records in LSN order, before or after the commit, until the next `begin`.
    pub fn records(group: *const Group) Records {
        return .{ .group = group, .offset = @sizeOf(wal.GroupHeader), .remaining = group.record_count };
    }

    pub const Records = struct {
        group: *const Group,
        offset: u32,
        remaining: u32,

        pub fn next(iterator: *Records) ?Slot {
            if (iterator.remaining == 0) return null;
            const memory = iterator.group.memory;
            const header: *wal.RecordHeader = @ptrCast(@alignCast(memory[iterator.offset..][0..@sizeOf(wal.RecordHeader)]));
            const payload = memory[iterator.offset + @sizeOf(wal.RecordHeader) ..][0..header.length_bytes];
            iterator.offset += wal.recordBytes(header.length_bytes);
            iterator.remaining -= 1;
            assert(iterator.offset <= iterator.group.length_bytes);
            return .{ .header = header, .payload = payload, .lsn = header.lsn };
        }
    };

    /// Where a group goes.
    pub const Place = struct {
        segment_id: u64,
        segment_first_lsn: u64,
        segment_epoch: u64,
        /// In the segment; a multiple of the block size.
        offset: u64,
    };

    /// Makes the group ready for its place: stamps and seals every header. For `Log.commit`, which calls it again
    /// where the group goes to another segment.
    pub fn stamp(group: *Group, place: Place, durable_lsn: u64, realtime_ns: u64) void {
        assert(group.record_count > 0);
        assert(place.offset % wal.block_size == 0);
        var iterator = group.records();
        while (iterator.next()) |slot| {
            slot.header.segment_id = place.segment_id;
            slot.header.header_checksum = slot.header.computeChecksum();
        }
        assert(iterator.offset == group.length_bytes);
        const header: *wal.GroupHeader = @ptrCast(group.memory.ptr);
        header.* = .{
            .header_checksum = 0,
            .magic = wal.group_magic,
            .segment_id = place.segment_id,
            .first_lsn = group.first_lsn,
            .durable_lsn = durable_lsn,
            .record_count = group.record_count,
            .length_bytes = group.length_bytes,
            .written_realtime_ns = realtime_ns,
            .version = wal.version,
            .reserved_0 = 0,
            .block = @intCast(place.offset / wal.block_size),
            .segment_first_lsn = place.segment_first_lsn,
            .segment_epoch = place.segment_epoch,
            .reserved_1 = @splat(0),
        };
        header.header_checksum = header.computeChecksum();
        @memset(group.memory[group.length_bytes..group.commitBytes()], 0);
    }

    /// What goes to disk, once stamped.
    pub fn commitMemory(group: *const Group) []align(wal.block_size) const u8 {
        return group.memory[0..group.commitBytes()];
    }
};

/// The records of groups that lie side by side in memory as they were written. Each one's headers are made those of
/// another place on the way: once `next` has given null, all of it can be written there.
pub const Written = struct {
    memory: []align(wal.block_size) u8,
    /// Of the first group.
    place: Group.Place,
    group_offset: usize = 0,
    offset: usize = 0,
    remaining: u32 = 0,

    pub fn next(written: *Written) ?*const wal.RecordHeader {
        if (written.remaining == 0) {
            if (written.offset > 0) {
                const before: *const wal.GroupHeader = @ptrCast(@alignCast(written.memory[written.group_offset..].ptr));
                assert(written.offset - written.group_offset == before.length_bytes);
                written.group_offset += std.mem.alignForward(usize, before.length_bytes, wal.block_size);
            }
            if (written.group_offset == written.memory.len) return null;
            const group: *wal.GroupHeader = @ptrCast(@alignCast(written.memory[written.group_offset..].ptr));
            assert(group.magic == wal.group_magic);
            group.segment_id = written.place.segment_id;
            group.segment_first_lsn = written.place.segment_first_lsn;
            group.segment_epoch = written.place.segment_epoch;
            group.block = @intCast((written.place.offset + written.group_offset) / wal.block_size);
            group.header_checksum = group.computeChecksum();
            written.remaining = group.record_count;
            written.offset = written.group_offset + @sizeOf(wal.GroupHeader);
        }
        const header: *wal.RecordHeader = @ptrCast(@alignCast(written.memory[written.offset..].ptr));
        assert(header.magic == wal.record_magic);
        header.segment_id = written.place.segment_id;
        header.header_checksum = header.computeChecksum();
        written.offset += wal.recordBytes(header.length_bytes);
        written.remaining -= 1;
        return header;
    }
};

comptime {
    assert(@sizeOf(wal.GroupHeader) % 8 == 0);
    assert(@sizeOf(wal.RecordHeader) % 8 == 0);
    // The longest record fits a group of the greatest size more than once.
    assert(@sizeOf(wal.GroupHeader) + 2 * (@sizeOf(wal.RecordHeader) + wal.payload_bytes_max) <= wal.group_bytes_max);
}
