//! Memory in which logs keep what they have written and not yet synced (wal/log.zig). A fixed number of equal pieces,
//! for all routes together: when all are lent the worker syncs the route that has waited longest.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const wal = @import("../format/wal.zig");
const os = @import("os.zig");
const Failure = @import("failure.zig").Failure;

pub const tail_count = 32;
/// A group that is longer is committed durably at once: what its sync costs is little beside writing it.
pub const tail_bytes = 2 << 20;

pub const Memory = []align(wal.block_size) u8;

pub const Tails = struct {
    memory: []align(std.heap.page_size_min) u8,
    free: [tail_count]Memory,
    free_count: u32,

    pub fn init(failure: *Failure) error{Failed}!Tails {
        const bytes = tail_count * tail_bytes;
        // Touched as it is used: routes that sync each group need none of it.
        const memory = switch (os.check(linux.mmap(null, bytes, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .PRIVATE, .ANONYMOUS = true, .NORESERVE = true }, -1, 0))) {
            .value => |address| @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(address))[0..bytes],
            .errno => |errno| return failure.set(errno, "cannot map {d} bytes for unsynced records: {s}", .{ bytes, Failure.nameOf(errno) }),
        };
        var tails = Tails{ .memory = memory, .free = undefined, .free_count = tail_count };
        for (&tails.free, 0..) |*piece, i| piece.* = @alignCast(memory[(tail_count - 1 - i) * tail_bytes ..][0..tail_bytes]);
        return tails;
    }

    pub fn deinit(tails: *Tails) void {
        _ = linux.munmap(tails.memory.ptr, tails.memory.len);
    }

    /// The one that was given back last: as few as possible are ever touched.
    pub fn take(tails: *Tails) ?Memory {
        if (tails.free_count == 0) return null;
        tails.free_count -= 1;
        return tails.free[tails.free_count];
    }

    pub fn give(tails: *Tails, piece: Memory) void {
        assert(piece.len == tail_bytes and tails.free_count < tail_count);
        tails.free[tails.free_count] = piece;
        tails.free_count += 1;
    }
};

comptime {
    assert(tail_bytes % wal.block_size == 0);
    assert(tail_bytes <= wal.group_bytes_max);
}

test "each piece is lent to one at a time, and the last one given back is the next" {
    var failure = Failure{};
    var tails = try Tails.init(&failure);
    defer tails.deinit();
    var taken: [tail_count]Memory = undefined;
    for (&taken, 0..) |*piece, i| {
        piece.* = tails.take().?;
        try std.testing.expectEqual(tail_bytes, piece.len);
        piece.*[0] = @intCast(i);
        piece.*[tail_bytes - 1] = @intCast(i);
    }
    try std.testing.expectEqual(null, tails.take());
    for (taken, 0..) |piece, i| try std.testing.expectEqual(@as(u8, @intCast(i)), piece[0]);
    for (taken, 0..) |piece, i| try std.testing.expectEqual(@as(u8, @intCast(i)), piece[tail_bytes - 1]);
    tails.give(taken[5]);
    try std.testing.expectEqual(taken[5].ptr, tails.take().?.ptr);
}
