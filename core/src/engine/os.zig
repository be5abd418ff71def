//! System calls as the engine uses them: raw, with the errno in the error path of a small union, so that a
//! caller can put the number into an event, a position or an answer without a table.

const std = @import("std");
const linux = std.os.linux;

/// What a system call gave: a value, or an errno.
pub const Result = union(enum) {
    value: usize,
    errno: i32,

    /// The value, or null where it failed.
    pub fn ok(result: Result) ?usize {
        return switch (result) {
            .value => |value| value,
            .errno => null,
        };
    }

    /// 0, or the errno.
    pub fn err(result: Result) i32 {
        return switch (result) {
            .value => 0,
            .errno => |errno| errno,
        };
    }
};

pub fn check(raw: usize) Result {
    const signed: isize = @bitCast(raw);
    if (signed < 0 and signed > -4096) return .{ .errno = @intCast(-signed) };
    return .{ .value = raw };
}

pub fn descriptor(raw: usize) union(enum) { fd: i32, errno: i32 } {
    return switch (check(raw)) {
        .value => |value| .{ .fd = @intCast(value) },
        .errno => |errno| .{ .errno = errno },
    };
}

/// LOCK_EX | LOCK_NB of flock(2).
pub const lock_exclusive = 2 | 4;

pub fn close(fd: i32) void {
    _ = linux.close(fd);
}

pub fn monotonicNs() u64 {
    return clock(.MONOTONIC);
}

pub fn realtimeNs() u64 {
    return clock(.REALTIME);
}

fn clock(id: linux.clockid_t) u64 {
    var time: linux.timespec = undefined;
    // The C library's: it knows the vDSO, and takes 30 ns where the system call takes 150.
    const result = std.c.clock_gettime(id, &time);
    std.debug.assert(result == 0);
    return @as(u64, @intCast(time.sec)) * std.time.ns_per_s + @as(u64, @intCast(time.nsec));
}

pub fn randomBytes(buffer: []u8) void {
    var filled: usize = 0;
    while (filled < buffer.len) {
        // getrandom does not fail for requests of this size once the kernel's pool is ready.
        switch (check(linux.getrandom(buffer.ptr + filled, buffer.len - filled, 0))) {
            .value => |count| filled += count,
            .errno => |errno| if (errno != @intFromEnum(linux.E.INTR)) std.debug.panic("getrandom: errno {d}", .{errno}),
        }
    }
}

pub fn randomU64() u64 {
    var bytes: [8]u8 = undefined;
    randomBytes(&bytes);
    return std.mem.readInt(u64, &bytes, .little);
}

/// Shared (not private) futexes: the words lie in memory of several processes.
pub fn futexWake(word: *const u32, count: u32) void {
    _ = linux.futex_3arg(word, .{ .cmd = .WAKE, .private = false }, count);
}

pub fn futexWakeBits(word: *const u32, mask: u32) void {
    _ = linux.futex(word, .{ .cmd = .WAKE_BITSET, .private = false }, std.math.maxInt(i32), .{ .timeout = null }, null, mask);
}

/// Waits until woken, the value changed, or `timeout_ns` passed; tells nothing about which.
pub fn futexWait(word: *const u32, expected: u32, timeout_ns: u64) void {
    const timeout = linux.timespec{
        .sec = @intCast(timeout_ns / std.time.ns_per_s),
        .nsec = @intCast(timeout_ns % std.time.ns_per_s),
    };
    _ = linux.futex_4arg(word, .{ .cmd = .WAIT, .private = false }, expected, &timeout);
}

const FutexWaiter = extern struct { expected: u64, address: u64, flags: u32, reserved: u32 = 0 };
const futex2_size_u32 = 2;
pub const futexes_max = 128;

/// As `futexWait`, on several words at once. Before Linux 5.16, which brought that, the first one is waited for, and
/// the others are looked at after a ms.
pub fn futexWaitAny(words: []const *const u32, expected: u32, timeout_ns: u64) void {
    var waiters: [futexes_max]FutexWaiter = undefined;
    for (words, waiters[0..words.len]) |word, *waiter| waiter.* = .{ .expected = expected, .address = @intFromPtr(word), .flags = futex2_size_u32 };
    const deadline_ns = monotonicNs() + timeout_ns;
    const deadline = linux.timespec{
        .sec = @intCast(deadline_ns / std.time.ns_per_s),
        .nsec = @intCast(deadline_ns % std.time.ns_per_s),
    };
    const result = check(linux.syscall5(.futex_waitv, @intFromPtr(&waiters), words.len, 0, @intFromPtr(&deadline), @intFromEnum(linux.clockid_t.MONOTONIC)));
    if (result.err() == @intFromEnum(linux.E.NOSYS)) futexWait(words[0], expected, @min(timeout_ns, std.time.ns_per_ms));
}

pub const Stat = struct {
    device: u64,
    inode: u64,
    mode: u32,
    links: u32,
    uid: u32,
    gid: u32,
    size: u64,

    pub fn isRegular(stat: Stat) bool {
        return stat.mode & linux.S.IFMT == linux.S.IFREG;
    }

    pub fn isDirectory(stat: Stat) bool {
        return stat.mode & linux.S.IFMT == linux.S.IFDIR;
    }
};

pub fn statOf(fd: i32) union(enum) { stat: Stat, errno: i32 } {
    var buffer: linux.Statx = undefined;
    const result = check(linux.statx(fd, "", linux.AT.EMPTY_PATH, linux.STATX_BASIC_STATS, &buffer));
    if (result == .errno) return .{ .errno = result.errno };
    return .{ .stat = .{
        .device = @as(u64, buffer.dev_major) << 32 | buffer.dev_minor,
        .inode = buffer.ino,
        .mode = buffer.mode,
        .links = buffer.nlink,
        .uid = buffer.uid,
        .gid = buffer.gid,
        .size = buffer.size,
    } };
}

/// Size of a file, and nothing else of it: whoever asks for its times makes the kernel give its next write a time
/// of full precision (multigrain timestamps, Linux 6.13), and that moves the clock of every other file on the host:
/// the log's own inode would then be dirty, and written, with each commit instead of once in a tick.
pub fn sizeOf(fd: i32) ?u64 {
    var buffer: linux.Statx = undefined;
    if (check(linux.statx(fd, "", linux.AT.EMPTY_PATH, linux.STATX_SIZE, &buffer)) == .errno) return null;
    return buffer.size;
}

/// Names that a file has: 0 once it is gone from all directories. And nothing else of it, as above.
pub fn linksOf(fd: i32) ?u32 {
    var buffer: linux.Statx = undefined;
    if (check(linux.statx(fd, "", linux.AT.EMPTY_PATH, linux.STATX_NLINK, &buffer)) == .errno) return null;
    return buffer.nlink;
}

/// Path of an open descriptor as the kernel knows it now, into `buffer`; null where it has none.
pub fn pathOf(fd: i32, buffer: *[4096]u8) ?[:0]u8 {
    var link: [32]u8 = undefined;
    const name = std.fmt.bufPrintZ(&link, "/proc/self/fd/{d}", .{fd}) catch unreachable;
    const length = check(linux.readlink(name, buffer, buffer.len - 1)).ok() orelse return null;
    if (length == buffer.len - 1) return null;
    buffer[length] = 0;
    const path = buffer[0..length :0];
    if (path.len == 0 or path[0] != '/') return null;
    return path;
}
