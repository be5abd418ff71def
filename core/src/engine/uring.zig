//! One io_uring, for the thread that made it: no locks, no callbacks. Set up with SINGLE_ISSUER and
//! DEFER_TASKRUN, so that completions are only worked on when this thread asks for them.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const os = @import("os.zig");

pub const Uring = struct {
    fd: i32,
    memory: []align(std.heap.page_size_min) u8,
    entries: []linux.io_uring_sqe,
    sq_head: *u32,
    sq_tail: *u32,
    sq_mask: u32,
    cq_head: *u32,
    cq_tail: *u32,
    cq_mask: u32,
    completions: [*]const linux.io_uring_cqe,
    /// Prepared, not yet handed to the kernel.
    unsubmitted: u32,

    pub const Error = error{UringUnavailable};

    /// `entry_count`: a power of two. `errno_out` says why where it fails.
    pub fn init(entry_count: u16, errno_out: *i32) Error!Uring {
        assert(std.math.isPowerOfTwo(entry_count));
        var parameters = std.mem.zeroes(linux.io_uring_params);
        parameters.flags = linux.IORING_SETUP_SINGLE_ISSUER | linux.IORING_SETUP_DEFER_TASKRUN | linux.IORING_SETUP_CLAMP;
        const fd = switch (os.descriptor(linux.io_uring_setup(entry_count, &parameters))) {
            .fd => |fd| fd,
            .errno => |errno| {
                errno_out.* = errno;
                return error.UringUnavailable;
            },
        };
        errdefer os.close(fd);
        if (parameters.features & linux.IORING_FEAT_SINGLE_MMAP == 0 or parameters.features & linux.IORING_FEAT_EXT_ARG == 0) {
            errno_out.* = @intFromEnum(linux.E.NOSYS);
            return error.UringUnavailable;
        }
        const sq_bytes = parameters.sq_off.array + parameters.sq_entries * @sizeOf(u32);
        const cq_bytes = parameters.cq_off.cqes + parameters.cq_entries * @sizeOf(linux.io_uring_cqe);
        const memory = try map(fd, @max(sq_bytes, cq_bytes), linux.IORING_OFF_SQ_RING, errno_out);
        errdefer _ = linux.munmap(memory.ptr, memory.len);
        const sqe_memory = try map(fd, parameters.sq_entries * @sizeOf(linux.io_uring_sqe), linux.IORING_OFF_SQES, errno_out);

        const entries: [*]linux.io_uring_sqe = @ptrCast(@alignCast(sqe_memory.ptr));
        const array: [*]u32 = @ptrCast(@alignCast(memory.ptr + parameters.sq_off.array));
        for (0..parameters.sq_entries) |i| array[i] = @intCast(i);
        return .{
            .fd = fd,
            .memory = memory,
            .entries = entries[0..parameters.sq_entries],
            .sq_head = word(memory, parameters.sq_off.head),
            .sq_tail = word(memory, parameters.sq_off.tail),
            .sq_mask = word(memory, parameters.sq_off.ring_mask).*,
            .cq_head = word(memory, parameters.cq_off.head),
            .cq_tail = word(memory, parameters.cq_off.tail),
            .cq_mask = word(memory, parameters.cq_off.ring_mask).*,
            .completions = @ptrCast(@alignCast(memory.ptr + parameters.cq_off.cqes)),
            .unsubmitted = 0,
        };
    }

    pub fn deinit(uring: *Uring) void {
        const sqe_memory = std.mem.sliceAsBytes(uring.entries);
        _ = linux.munmap(sqe_memory.ptr, std.mem.alignForward(usize, sqe_memory.len, std.heap.page_size_min));
        _ = linux.munmap(uring.memory.ptr, uring.memory.len);
        os.close(uring.fd);
    }

    fn map(fd: i32, length: usize, offset: u64, errno_out: *i32) Error![]align(std.heap.page_size_min) u8 {
        const aligned = std.mem.alignForward(usize, length, std.heap.page_size_min);
        switch (os.check(linux.mmap(null, aligned, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED, .POPULATE = true }, fd, @intCast(offset)))) {
            .value => |address| {
                const pointer: [*]align(std.heap.page_size_min) u8 = @ptrFromInt(address);
                return pointer[0..aligned];
            },
            .errno => |errno| {
                errno_out.* = errno;
                return error.UringUnavailable;
            },
        }
    }

    fn word(memory: []align(std.heap.page_size_min) u8, offset: u32) *u32 {
        return @ptrCast(@alignCast(memory.ptr + offset));
    }

    /// Keeps a reference to `fd` in the kernel until the last operation of this ring has landed, also when
    /// this process has been killed. Errno, or 0.
    pub fn registerDescriptor(uring: *Uring, fd: i32) i32 {
        const list = [1]i32{fd};
        return os.check(linux.io_uring_register(uring.fd, .REGISTER_FILES, &list, 1)).err();
    }

    /// The next free entry, zeroed; null where the queue is full (submit first).
    pub fn prepare(uring: *Uring) ?*linux.io_uring_sqe {
        const tail = uring.sq_tail.*;
        const head = @atomicLoad(u32, uring.sq_head, .acquire);
        if (tail -% head == uring.entries.len) return null;
        const entry = &uring.entries[tail & uring.sq_mask];
        entry.* = std.mem.zeroes(linux.io_uring_sqe);
        // The kernel reads the tail only in io_uring_enter by this very thread (no SQPOLL).
        @atomicStore(u32, uring.sq_tail, tail +% 1, .release);
        uring.unsubmitted += 1;
        return entry;
    }

    /// Hands over what is prepared; waits for nothing.
    pub fn submit(uring: *Uring) void {
        uring.enter(0, null);
    }

    /// Hands over what is prepared, and waits for a completion up to `timeout_ns`.
    pub fn submitAndWait(uring: *Uring, timeout_ns: u64) void {
        const time = linux.timespec{ .sec = @intCast(timeout_ns / std.time.ns_per_s), .nsec = @intCast(timeout_ns % std.time.ns_per_s) };
        uring.enter(1, &time);
    }

    fn enter(uring: *Uring, wait_count: u32, timeout: ?*const linux.timespec) void {
        const argument = linux.io_uring_getevents_arg{
            .sigmask = 0,
            .sigmask_sz = 0,
            .pad = 0,
            .ts = @intFromPtr(timeout),
        };
        // GETEVENTS also where nothing is waited for: with DEFER_TASKRUN completions appear only then.
        const flags: u32 = linux.IORING_ENTER_GETEVENTS | linux.IORING_ENTER_EXT_ARG;
        const raw = linux.syscall6(.io_uring_enter, @as(usize, @bitCast(@as(isize, uring.fd))), uring.unsubmitted, wait_count, flags, @intFromPtr(&argument), @sizeOf(linux.io_uring_getevents_arg));
        switch (os.check(raw)) {
            .value => |count| uring.unsubmitted -= @intCast(count),
            // ETIME, EINTR: nothing came. EAGAIN, EBUSY: the kernel is short of memory, or completions must be
            // taken first; what is prepared stays prepared, and the caller comes back after its next look.
            .errno => uring.unsubmitted = uring.sq_tail.* -% @atomicLoad(u32, uring.sq_head, .acquire),
        }
    }

    /// The oldest completion that has not been taken, or null.
    pub fn take(uring: *Uring) ?linux.io_uring_cqe {
        const head = uring.cq_head.*;
        if (head == @atomicLoad(u32, uring.cq_tail, .acquire)) return null;
        const completion = uring.completions[head & uring.cq_mask];
        @atomicStore(u32, uring.cq_head, head +% 1, .release);
        return completion;
    }
};

test "an operation is submitted, waited for and taken" {
    var errno: i32 = 0;
    var uring = try Uring.init(8, &errno);
    defer uring.deinit();
    const entry = uring.prepare().?;
    entry.opcode = .NOP;
    entry.user_data = 7;
    uring.submitAndWait(std.time.ns_per_s);
    try std.testing.expectEqual(@as(u64, 7), uring.take().?.user_data);
    try std.testing.expectEqual(null, uring.take());
    uring.submitAndWait(std.time.ns_per_ms);
    try std.testing.expectEqual(null, uring.take());
}

test "a full queue says so, and takes more once submitted" {
    var errno: i32 = 0;
    var uring = try Uring.init(4, &errno);
    defer uring.deinit();
    var total: usize = 0;
    for (0..3) |_| {
        while (uring.prepare()) |entry| entry.opcode = .NOP;
        uring.submit();
        while (uring.take()) |_| total += 1;
    }
    try std.testing.expectEqual(@as(usize, 12), total);
}
