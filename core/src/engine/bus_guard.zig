//! The shared ring's file can be cut short by anybody who may write to it, and whoever then touches what is gone gets
//! SIGBUS. The daemon must not go down with it: here the missing page becomes one of zeros, and the ring counts as lost
//! (see Worker.loseRing).

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const os = @import("os.zig");

const regions_max = 256;

const Region = struct {
    /// 0: none.
    start: usize = 0,
    length: usize = 0,
    lost: bool = false,
};

var regions: [regions_max]Region = @splat(.{});
var before: std.posix.Sigaction = undefined;
var installed = false;

/// Starting and control thread, for memory that others can truncate; until `forget`. What it gives becomes true, for any
/// thread, once some of the memory is gone; null: too much is watched already.
pub fn watch(memory: []align(std.heap.page_size_min) u8) ?*const bool {
    if (!installed) {
        const action = std.posix.Sigaction{
            .handler = .{ .sigaction = onBusError },
            .mask = std.posix.sigemptyset(),
            .flags = linux.SA.SIGINFO | linux.SA.ONSTACK | linux.SA.RESTART,
        };
        std.posix.sigaction(linux.SIG.BUS, &action, &before);
        installed = true;
    }
    for (&regions) |*region| {
        if (@atomicLoad(usize, &region.start, .acquire) != 0) continue;
        region.length = memory.len;
        region.lost = false;
        @atomicStore(usize, &region.start, @intFromPtr(memory.ptr), .release);
        return &region.lost;
    }
    return null;
}

/// Before it is unmapped.
pub fn forget(memory: []align(std.heap.page_size_min) u8) void {
    if (find(@intFromPtr(memory.ptr))) |region| @atomicStore(usize, &region.start, 0, .release);
}

fn find(address: usize) ?*Region {
    for (&regions) |*region| {
        const start = @atomicLoad(usize, &region.start, .acquire);
        if (start != 0 and address >= start and address < start + region.length) return region;
    }
    return null;
}

fn onBusError(signal: i32, info: *const linux.siginfo_t, context: ?*anyopaque) callconv(.c) void {
    _ = .{ signal, context };
    const address = @intFromPtr(info.fields.sigfault.addr);
    const page = std.heap.pageSize();
    if (find(address)) |region| {
        const flags = linux.MAP{ .TYPE = .PRIVATE, .ANONYMOUS = true, .FIXED = true };
        const mapped = linux.mmap(@ptrFromInt(address - address % page), page, linux.PROT.READ | linux.PROT.WRITE, flags, -1, 0);
        if (os.check(mapped).err() == 0) {
            @atomicStore(bool, &region.lost, true, .release);
            return;
        }
    }
    // Not ours: whoever was there before, or the end, when the instruction is done again.
    std.posix.sigaction(linux.SIG.BUS, &before, null);
}

test "memory that is cut off under us reads as zeros, and is known to be lost" {
    const page = std.heap.pageSize();
    const fd: i32 = @intCast(os.check(linux.memfd_create("elgate-test", 0)).ok().?);
    defer os.close(fd);
    try std.testing.expectEqual(0, os.check(linux.ftruncate(fd, @intCast(3 * page))).err());
    const address = os.check(linux.mmap(null, 3 * page, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, fd, 0)).ok().?;
    const memory = @as([*]align(std.heap.page_size_min) volatile u8, @ptrFromInt(address))[0 .. 3 * page];
    defer _ = linux.munmap(@volatileCast(memory.ptr), memory.len);
    const lost = watch(@volatileCast(memory)).?;
    defer forget(@volatileCast(memory));
    @memset(memory, 1);
    try std.testing.expect(!@atomicLoad(bool, lost, .acquire));
    try std.testing.expectEqual(0, os.check(linux.ftruncate(fd, @intCast(page))).err());
    try std.testing.expectEqual(1, memory[0]);
    try std.testing.expectEqual(0, memory[page]);
    memory[2 * page + 5] = 7;
    try std.testing.expectEqual(7, memory[2 * page + 5]);
    try std.testing.expect(@atomicLoad(bool, lost, .acquire));
}
