//! Reads records of a running log again: what a target has lost is still here. Any thread but the worker; the log goes
//! on meanwhile, only opening a segment takes the lock of maintenance.
//!
//! The caller sees to it that no checkpoint passes what is read.

const std = @import("std");
const assert = std.debug.assert;
const wal = @import("../../format/wal.zig");
const log_module = @import("log.zig");
const reader_module = @import("reader.zig");
const storage_module = @import("storage.zig");
const Log = log_module.Log;
const SegmentReader = reader_module.SegmentReader;

pub const Error = storage_module.Error || error{ OutOfMemory, VisitorStopped };

/// The payload is valid during the call only. VisitorStopped ends the reading with that error.
pub const Visitor = struct {
    context: *anyopaque,
    visit: *const fn (context: *anyopaque, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void,
};

/// Every record from `first_lsn` to `last_lsn` (which is durable), in order, each once. BadMessage where one of them
/// cannot be read any more; those that the last recovery has reported missing are left out.
pub fn readBack(log: *Log, first_lsn: u64, last_lsn: u64, visitor: Visitor) Error!void {
    assert(log.stage == .recovered);
    assert(last_lsn <= log.durableLsn());
    var lsn = first_lsn;
    while (lsn <= last_lsn) {
        const part = try open(log, lsn);
        defer log.storage.close(part.file);
        try present(log, lsn, part.first_lsn);
        lsn = try read(log, &part, @max(lsn, part.first_lsn), @min(last_lsn, part.last_lsn), visitor);
    }
}

/// A segment, as it was when it was opened, by a descriptor of the reader's own.
const Part = struct {
    file: storage_module.File,
    id: u64,
    size_bytes: u64,
    readable_bytes: u64,
    first_lsn: u64,
    last_lsn: u64,
};

/// The segment that holds this record, or the next one behind it.
fn open(log: *Log, lsn: u64) Error!Part {
    // Names change, and segments go, under this lock alone.
    log.maintenance.lock();
    defer log.maintenance.unlock();
    log.takeAdded();
    var next = log.segments;
    while (next) |segment| : (next = segment.next) {
        const last_lsn = segment.last_lsn.load(.monotonic);
        if (last_lsn < lsn) continue;
        return .{
            .file = try log.storage.open(log.directory, segment.name(), log.direct),
            .id = segment.id,
            .size_bytes = segment.size_bytes,
            .readable_bytes = segment.readable_bytes,
            .first_lsn = segment.first_lsn,
            .last_lsn = last_lsn,
        };
    }
    return error.BadMessage;
}

/// The records of one segment; the LSN behind the last.
fn read(log: *Log, part: *const Part, first_lsn: u64, last_lsn: u64, visitor: Visitor) Error!u64 {
    const window = try log.allocator.alignedAlloc(u8, .fromByteUnits(wal.block_size), SegmentReader.windowBytes(part.size_bytes));
    defer log.allocator.free(window);
    var reader = SegmentReader.init(log.storage, part.file, part.id, part.size_bytes, part.readable_bytes, window);
    var lsn = first_lsn;
    while (lsn <= last_lsn) {
        const group = try reader.next() orelse break;
        if (group.lastLsn() < lsn) continue;
        var records = try reader.records(group);
        while (records.next()) |item| switch (item) {
            .bad => |bad| {
                if (bad.last_lsn < lsn or bad.first_lsn > last_lsn) continue;
                try present(log, @max(bad.first_lsn, lsn), @min(bad.last_lsn, last_lsn) + 1);
            },
            .good => |good| {
                if (good.header.lsn < lsn or good.header.lsn > last_lsn) continue;
                try present(log, lsn, good.header.lsn);
                try visitor.visit(visitor.context, good.header, good.payload);
                lsn = good.header.lsn + 1;
            },
        };
    }
    try present(log, lsn, last_lsn + 1);
    return last_lsn + 1;
}

/// Nothing from `first_lsn` up to, not including, `end_lsn` has turned up: right only where recovery has said so.
fn present(log: *const Log, first_lsn: u64, end_lsn: u64) error{BadMessage}!void {
    var lsn = first_lsn;
    for (log.recovery.missing) |range| {
        if (lsn >= range.first and lsn <= range.last) lsn = range.last + 1;
    }
    if (lsn < end_lsn) return error.BadMessage;
}
