//! The few system calls that the client makes, raw: it runs underneath hooks of the C library's own functions,
//! and it must leave the caller's errno alone.

const std = @import("std");
const linux = std.os.linux;

pub const E = linux.E;

/// -errno, as every function of the C ABI returns it.
pub fn negative(errno: E) i32 {
    return -@as(i32, @intFromEnum(errno));
}

/// The errno in what a raw system call returned, or null where it succeeded.
pub fn failure(result: usize) ?E {
    const signed: isize = @bitCast(result);
    return if (signed < 0 and signed > -4096) @enumFromInt(-signed) else null;
}

extern "c" fn clock_gettime(clock: c_int, time: *linux.timespec) c_int;
extern "c" fn secure_getenv(name: [*:0]const u8) ?[*:0]const u8;

/// CLOCK_MONOTONIC. Through the C library, whose vDSO call costs a tenth of the system call.
pub fn monotonicNs() u64 {
    var time: linux.timespec = undefined;
    if (clock_gettime(1, &time) != 0) return 0;
    return @as(u64, @intCast(time.sec)) * std.time.ns_per_s + @as(u64, @intCast(time.nsec));
}

/// An environment variable; null where a set-uid program must not listen to its caller's.
pub fn environment(name: [*:0]const u8) ?[]const u8 {
    const value = std.mem.span(secure_getenv(name) orelse return null);
    return if (value.len == 0) null else value;
}

pub fn close(fd: i32) void {
    _ = linux.close(fd);
}

/// Gives the processor away for a while, on paths where nothing can wake us. A signal ends it.
pub fn sleepNs(duration_ns: u64) Woken {
    const time = timespec(duration_ns);
    return if (failure(linux.nanosleep(&time, null)) == .INTR) .interrupted else .timed_out;
}

fn timespec(ns: u64) linux.timespec {
    return .{ .sec = @intCast(ns / std.time.ns_per_s), .nsec = @intCast(ns % std.time.ns_per_s) };
}

pub const Scope = enum { shared, private };

pub const Woken = enum {
    woken_or_changed,
    timed_out,
    /// A signal handler has run in this thread.
    interrupted,
};

/// FUTEX_WAIT for at most `timeout_ns`.
pub fn futexWait(word: *const u32, expected: u32, scope: Scope, timeout_ns: u64) Woken {
    const timeout = timespec(timeout_ns);
    const operation = linux.FUTEX_OP{ .cmd = .WAIT, .private = scope == .private };
    return wokenBy(linux.futex_4arg(word, operation, expected, &timeout));
}

/// FUTEX_WAIT_BITSET, shared, until `deadline_ns` of the monotonic clock.
pub fn futexWaitBits(word: *const u32, expected: u32, bits: u32, deadline_ns: u64) Woken {
    const deadline = timespec(deadline_ns);
    const operation = linux.FUTEX_OP{ .cmd = .WAIT_BITSET, .private = false };
    return wokenBy(linux.futex(word, operation, expected, .{ .timeout = &deadline }, null, bits));
}

fn wokenBy(result: usize) Woken {
    const errno = failure(result) orelse return .woken_or_changed;
    return switch (errno) {
        .TIMEDOUT => .timed_out,
        .INTR => .interrupted,
        else => .woken_or_changed,
    };
}

pub fn futexWake(word: *const u32, count: u31, scope: Scope) void {
    _ = linux.futex_3arg(word, .{ .cmd = .WAKE, .private = scope == .private }, count);
}

pub const FileStatus = struct {
    device: u64,
    inode: u64,
    links: u64,
    size_bytes: u64,
    mode: u32,
    /// When the inode was made, where the file system knows: tells a file from an earlier one of its number.
    birth_ns: u64 = 0,

    pub fn isRegular(status: FileStatus) bool {
        return status.mode & linux.S.IFMT == linux.S.IFREG;
    }

    pub fn isSocket(status: FileStatus) bool {
        return status.mode & linux.S.IFMT == linux.S.IFSOCK;
    }
};

pub fn fileStatus(fd: i32) ?FileStatus {
    var status: linux.Stat = undefined;
    if (failure(linux.fstat(fd, &status)) != null) return null;
    return .{
        .device = status.dev,
        .inode = status.ino,
        .links = status.nlink,
        .size_bytes = @bitCast(status.size),
        .mode = status.mode,
    };
}

/// With the time of birth.
pub fn fileStatusWithBirth(fd: i32) ?FileStatus {
    var status = fileStatus(fd) orelse return null;
    var extended: linux.Statx = undefined;
    if (failure(linux.statx(fd, "", linux.AT.EMPTY_PATH, linux.STATX_BTIME, &extended)) == null and extended.mask & linux.STATX_BTIME != 0) {
        status.birth_ns = @as(u64, @bitCast(extended.btime.sec)) *% std.time.ns_per_s +% extended.btime.nsec;
    }
    return status;
}

/// O_* of an open descriptor.
pub fn statusFlags(fd: i32) ?linux.O {
    const result = linux.fcntl(fd, F_GETFL, 0);
    if (failure(result) != null) return null;
    return @bitCast(@as(u32, @truncate(result)));
}

/// The same descriptor under a number of at least `minimum`, close-on-exec; the old one is closed. Programs
/// count on getting the lowest numbers. Where the limit leaves no room up there, it stays where it is.
pub fn moveUp(fd: i32, minimum: i32) i32 {
    const result = linux.fcntl(fd, F_DUPFD_CLOEXEC, @intCast(minimum));
    if (failure(result) != null) return fd;
    close(fd);
    return @intCast(result);
}

const F_GETFL = 3;
const F_DUPFD_CLOEXEC = 1030;

pub const unlimited: u64 = std.math.maxInt(u64);

/// The soft limit of a resource of this process.
pub fn limit(resource: linux.rlimit_resource) u64 {
    var value: linux.rlimit = undefined;
    if (failure(linux.prlimit(0, resource, null, &value)) != null) return unlimited;
    return value.cur;
}

pub fn hardLimit(resource: linux.rlimit_resource) u64 {
    var value: linux.rlimit = undefined;
    if (failure(linux.prlimit(0, resource, null, &value)) != null) return unlimited;
    return value.max;
}

/// Zeroed memory that costs nothing until it is touched.
pub fn reserve(bytes: usize) ?[]align(std.heap.page_size_min) u8 {
    const flags = linux.MAP{ .TYPE = .PRIVATE, .ANONYMOUS = true, .NORESERVE = true };
    const result = linux.mmap(null, bytes, linux.PROT.READ | linux.PROT.WRITE, flags, -1, 0);
    if (failure(result) != null) return null;
    return @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(result))[0..bytes];
}

/// One line on stderr, for the person who looks why a program did what it did.
pub fn warn(comptime format: []const u8, arguments: anytype) void {
    var buffer: [1024]u8 = undefined;
    const line = std.fmt.bufPrint(&buffer, "elgate: " ++ format ++ "\n", arguments) catch blk: {
        buffer[buffer.len - 1] = '\n';
        break :blk &buffer;
    };
    _ = linux.write(2, line.ptr, line.len);
}
