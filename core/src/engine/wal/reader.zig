//! Reads a segment: its groups, their records, and what is damaged between them. Used by recovery and by whoever
//! inspects a log. Nothing on the disk is trusted: every length is checked against what there is before it is
//! used, and the arithmetic cannot overflow. Memory is bounded by one window of the greatest group's size.

const std = @import("std");
const assert = std.debug.assert;
const wal = @import("../../format/wal.zig");
const crc32c = @import("../../format/checksum.zig").crc32c;
const storage_module = @import("storage.zig");
const mutant = @import("mutant.zig");
const Storage = storage_module.Storage;
const File = storage_module.File;
const Error = storage_module.Error;

/// A segment that says it is larger than this is taken for damaged.
pub const segment_bytes_max: u64 = 4 << 30;
/// One group at least: header block, group block, trailer block.
pub const segment_bytes_min: u64 = 3 * wal.block_size;

/// No log ever gets so far. So that no sum of an LSN and a count passes the end of the numbers, here or later.
pub const lsn_max: u64 = std.math.maxInt(u64) / 4;

const read_ahead_bytes: usize = 1 << 20;

/// What a segment's first or last block holds.
pub const ParsedHeader = union(enum) {
    valid: wal.SegmentHeader,
    /// Whole, but of another version of the format.
    other_version: u16,
    zeros,
    damaged,
};

pub fn parseSegmentHeader(block: []const u8) ParsedHeader {
    assert(block.len >= @sizeOf(wal.SegmentHeader));
    var header: wal.SegmentHeader = undefined;
    @memcpy(std.mem.asBytes(&header), block[0..@sizeOf(wal.SegmentHeader)]);
    if (std.mem.allEqual(u8, block, 0)) return .zeros;
    if (header.magic != wal.segment_magic) return .damaged;
    if (header.header_checksum != header.computeChecksum() and !mutant.is(.segment_header_checksum_ignored)) return .damaged;
    if (header.version != wal.version) return .{ .other_version = header.version };
    if (header.size_bytes < segment_bytes_min or header.size_bytes > segment_bytes_max) return .damaged;
    if (header.size_bytes % wal.block_size != 0) return .damaged;
    if (@max(header.first_lsn, header.sealed_lsn, header.epoch) > lsn_max) return .damaged;
    return .{ .valid = header };
}

/// The header of the group that starts the block at this offset, where it is whole, of this segment, and where it
/// belongs.
pub fn parseGroupHeader(block: []const u8, segment_id: u64, offset: u64) ?wal.GroupHeader {
    assert(block.len >= @sizeOf(wal.GroupHeader));
    var header: wal.GroupHeader = undefined;
    @memcpy(std.mem.asBytes(&header), block[0..@sizeOf(wal.GroupHeader)]);
    if (header.magic != wal.group_magic) return null;
    if (header.header_checksum != header.computeChecksum() and !mutant.is(.group_header_checksum_ignored)) return null;
    if (header.version != wal.version) return null;
    if (header.segment_id != segment_id and !mutant.is(.segment_id_ignored)) return null;
    if (@as(u64, header.block) * wal.block_size != offset and !mutant.is(.group_place_ignored)) return null;
    if (header.first_lsn == 0 or header.record_count == 0) return null;
    if (header.length_bytes > wal.group_bytes_max) return null;
    const least = @sizeOf(wal.GroupHeader) + @as(u64, header.record_count) * @sizeOf(wal.RecordHeader);
    if (header.length_bytes < least) return null;
    if (@max(header.first_lsn, header.segment_epoch) > lsn_max) return null;
    if (header.durable_lsn >= header.first_lsn) return null;
    if (header.segment_first_lsn > header.first_lsn) return null;
    return header;
}

pub const Range = struct {
    offset: u64,
    length: u64,
};

pub const FoundGroup = struct {
    header: wal.GroupHeader,
    /// Of the group, in the segment.
    offset: u64,
    /// What lies between the end of the group before and this one: not a valid group. Often empty.
    skipped: Range,

    pub fn lastLsn(group: FoundGroup) u64 {
        return group.header.first_lsn + group.header.record_count - 1;
    }

    pub fn paddedBytes(group: FoundGroup) u64 {
        return std.mem.alignForward(u64, group.header.length_bytes, wal.block_size);
    }
};

pub const SegmentReader = struct {
    storage: Storage,
    file: File,
    segment_id: u64,
    /// No group reaches beyond.
    end: u64,
    /// Where the next group may start.
    position: u64,
    /// LSNs only rise within a segment: a group below is a copy that lies where it does not belong.
    lsn_floor: u64,
    /// Blocks that the disk refused to read; they count as damaged.
    unreadable_blocks: u64,
    window: []align(wal.block_size) u8,
    window_offset: u64,
    window_length: usize,

    /// `size_bytes`: of the segment by its header; `readable_bytes`: of the file.
    /// `window`: `windowBytes(size_bytes)` of memory at least, the caller's, for as long as the reader lives.
    pub fn init(storage: Storage, file: File, segment_id: u64, size_bytes: u64, readable_bytes: u64, window: []align(wal.block_size) u8) SegmentReader {
        assert(window.len >= windowBytes(size_bytes));
        return .{
            .storage = storage,
            .file = file,
            .segment_id = segment_id,
            .end = groupsEnd(size_bytes, readable_bytes),
            .position = wal.block_size,
            .lsn_floor = 1,
            .unreadable_blocks = 0,
            .window = window,
            .window_offset = 0,
            .window_length = 0,
        };
    }

    /// The longest group of a segment of this size fits.
    pub fn windowBytes(size_bytes: u64) usize {
        return @intCast(@min(size_bytes, wal.group_bytes_max));
    }

    /// Where groups end: the last block is the trailer, and the file may have been cut short.
    pub fn groupsEnd(size_bytes: u64, readable_bytes: u64) u64 {
        const end = @min(size_bytes -| wal.block_size, readable_bytes);
        return end - end % wal.block_size;
    }

    /// The next group whose header is whole, or null where there is none up to the end of the segment (then
    /// `position` is where the last one ended).
    pub fn next(reader: *SegmentReader) Error!?FoundGroup {
        const start = reader.position;
        while (reader.position < reader.end) {
            const offset = reader.position;
            const block = try reader.load(offset, wal.block_size);
            if (parseGroupHeader(block, reader.segment_id, offset)) |header| {
                const padded = std.mem.alignForward(u64, header.length_bytes, wal.block_size);
                if (header.first_lsn >= reader.lsn_floor and padded <= reader.end - offset) {
                    reader.position = offset + padded;
                    reader.lsn_floor = header.first_lsn + header.record_count;
                    return .{ .header = header, .offset = offset, .skipped = .{ .offset = start, .length = offset - start } };
                }
            }
            reader.position += wal.block_size;
        }
        reader.position = start;
        return null;
    }

    /// The group's records. What the iterator gives is valid until the next call of `next` or `records`.
    pub fn records(reader: *SegmentReader, group: FoundGroup) Error!RecordIterator {
        return .{
            .header = group.header,
            .bytes = try reader.load(group.offset, group.header.length_bytes),
            .offset = @sizeOf(wal.GroupHeader),
            .index = 0,
        };
    }

    /// Bytes of the segment, in the window: a block-aligned offset, at most a window long. What cannot be read is
    /// zeros.
    pub fn load(reader: *SegmentReader, offset: u64, length: usize) Error![]align(wal.block_size) const u8 {
        assert(offset % wal.block_size == 0);
        assert(length <= reader.window.len);
        assert(offset + length <= reader.end);
        const inside = offset >= reader.window_offset and
            offset + length <= reader.window_offset + reader.window_length;
        if (!inside) {
            const wanted = std.mem.alignForward(usize, @max(length, read_ahead_bytes), wal.block_size);
            const count: usize = @intCast(@min(wanted, reader.end - offset, reader.window.len));
            assert(count >= length);
            reader.window_length = 0;
            reader.unreadable_blocks += try readBlocks(reader.storage, reader.file, reader.window[0..count], offset);
            reader.window_offset = offset;
            reader.window_length = count;
        }
        const start: usize = @intCast(offset - reader.window_offset);
        return @alignCast(reader.window[start..][0..length]);
    }
};

/// Reads whole blocks; what lies beyond the end of the file, and blocks that the disk refuses, become zeros.
/// The number of the latter.
pub fn readBlocks(storage: Storage, file: File, buffer: []align(wal.block_size) u8, offset: u64) Error!u64 {
    assert(buffer.len % wal.block_size == 0);
    const length = storage.read(file, buffer, offset) catch |err| {
        if (!isMediaError(err)) return err;
        if (buffer.len == wal.block_size) return readBlock(storage, file, buffer, offset);
        var unreadable: u64 = 0;
        var done: usize = 0;
        while (done < buffer.len) : (done += wal.block_size) {
            unreadable += try readBlocks(storage, file, @alignCast(buffer[done..][0..wal.block_size]), offset + done);
        }
        return unreadable;
    };
    @memset(buffer[length..], 0);
    return 0;
}

/// A disk that fails to read now and then has lost nothing: what it gives at the third time is as good.
pub const media_attempts_max = 3;

/// One block that could not be read. 1: nor can it now.
fn readBlock(storage: Storage, file: File, block: []align(wal.block_size) u8, offset: u64) Error!u64 {
    for (1..media_attempts_max) |_| {
        const length = storage.read(file, block, offset) catch |err| if (isMediaError(err)) continue else return err;
        @memset(block[length..], 0);
        return 0;
    }
    @memset(block, 0);
    return 1;
}

/// The disk cannot give this back; other blocks, and other files, may be well.
pub fn isMediaError(err: Error) bool {
    return switch (err) {
        error.InputOutput, error.BadMessage, error.RemoteInputOutput, error.NeedsCleaning, error.TimedOut => true,
        else => false,
    };
}

pub const RecordIterator = struct {
    header: wal.GroupHeader,
    bytes: []align(wal.block_size) const u8,
    offset: usize,
    index: u32,

    pub const Item = union(enum) {
        good: struct { header: *const wal.RecordHeader, payload: []const u8 },
        /// These cannot be read.
        bad: struct { first_lsn: u64, last_lsn: u64 },
    };

    pub fn next(iterator: *RecordIterator) ?Item {
        if (iterator.index == iterator.header.record_count) return null;
        const lsn = iterator.header.first_lsn + iterator.index;
        if (iterator.recordAt(iterator.offset)) |record| {
            if (record.lsn == lsn) {
                const payload = iterator.bytes[iterator.offset + @sizeOf(wal.RecordHeader) ..][0..record.length_bytes];
                iterator.offset += wal.recordBytes(record.length_bytes);
                iterator.index += 1;
                if (crc32c(0, payload) == record.payload_checksum or mutant.is(.payload_checksum_ignored))
                    return .{ .good = .{ .header = record, .payload = payload } };
                return .{ .bad = .{ .first_lsn = lsn, .last_lsn = lsn } };
            }
        }
        // Its length cannot be trusted: look for a later record of this group at every place where one may be.
        const last_lsn = iterator.header.first_lsn + iterator.header.record_count - 1;
        var offset = iterator.offset + 8;
        while (offset + @sizeOf(wal.RecordHeader) <= iterator.bytes.len) : (offset += 8) {
            const record = iterator.recordAt(offset) orelse continue;
            if (record.lsn <= lsn or record.lsn > last_lsn) continue;
            iterator.offset = offset;
            iterator.index = @intCast(record.lsn - iterator.header.first_lsn);
            return .{ .bad = .{ .first_lsn = lsn, .last_lsn = record.lsn - 1 } };
        }
        iterator.index = iterator.header.record_count;
        return .{ .bad = .{ .first_lsn = lsn, .last_lsn = last_lsn } };
    }

    /// A whole record header whose payload lies in the group, or null.
    fn recordAt(iterator: *const RecordIterator, offset: usize) ?*const wal.RecordHeader {
        assert(offset % 8 == 0);
        if (iterator.bytes.len < @sizeOf(wal.RecordHeader)) return null;
        if (offset > iterator.bytes.len - @sizeOf(wal.RecordHeader)) return null;
        const record: *const wal.RecordHeader = @ptrCast(@alignCast(iterator.bytes[offset..][0..@sizeOf(wal.RecordHeader)]));
        if (record.magic != wal.record_magic) return null;
        if (record.segment_id != iterator.header.segment_id and !mutant.is(.segment_id_ignored)) return null;
        if (record.header_checksum != record.computeChecksum() and !mutant.is(.record_header_checksum_ignored)) return null;
        if (record.version != wal.version) return null;
        if (record.length_bytes > wal.payload_bytes_max) return null;
        if (wal.recordBytes(record.length_bytes) > iterator.bytes.len - offset) return null;
        return record;
    }
};
