//! What the client keeps per thread: its row in the ring, and the operations that it is in the middle of.
//!
//! A thread can be in several operations at once: a signal handler that writes comes in while the thread is
//! writing. The operations form a stack. An operation whose handler jumped out of it (siglongjmp) stays on it;
//! the next operation of the thread finds it and cleans up, so that its claim does not hold up the ring.
//!
//! How a dead operation is told from one that was merely interrupted: by where it stands on the stack. What is
//! still being executed stands above (at a higher address than) what interrupted it. On a signal stack nothing
//! can be said, and everything counts as alive. Two cases stay open, and cost a claim that stays open until the
//! thread ends: a handler that always jumps to a deeper place than where it came from, and one that runs on a
//! stack switched to by hand (swapcontext).

const std = @import("std");
const linux = std.os.linux;
const system = @import("system.zig");
const ring = @import("../format/ring.zig");
const Ring = @import("session.zig").Ring;
const File = @import("descriptors.zig").File;
const Inode = @import("descriptors.zig").Inode;

pub const no_row: u32 = std.math.maxInt(u32);

/// Handlers within handlers, each in the middle of a write. Beyond that the write fails.
pub const operations_max = 8;

pub const Operation = struct {
    /// Address of something in the operation's own frame; 0: just begun or just ended.
    frame: usize = 0,
    /// The file that it holds.
    file: ?*File = null,
    /// Position + 1 of its open claim, or 0.
    opening: u64 = 0,
};

pub const Thread = struct {
    /// In a child, what its only thread remembers is the parent's.
    fork_epoch: u32 = 0,
    row: u32 = no_row,
    ring: ?*const Ring = null,
    /// The session in which the row was lent (see Session.sequence), and the lease word that the row had then.
    sequence: u32 = 0,
    lease: u64 = 0,
    depth: u32 = 0,
    /// Of the ring of `sequence`, for one route: see producer.claim.
    allowed_below: u64 = 0,
    allowed_route: u32 = 0,
    /// The inode that this thread is making native.
    leaving: ?*const Inode = null,
    operations: [operations_max]Operation = @splat(.{}),

    /// Puts a new operation on the stack; null if there are too many. `place` lies in the caller's frame.
    pub fn push(thread: *Thread, place: usize) ?*Operation {
        const depth = thread.depth;
        if (depth == operations_max) return null;
        const operation = &thread.operations[depth];
        // A handler that comes in between these two finds frame 0: alive. Release keeps the compiler's order.
        @atomicStore(u32, &thread.depth, depth + 1, .release);
        @atomicStore(usize, &operation.frame, place, .release);
        return operation;
    }

    pub fn pop(thread: *Thread, operation: *Operation) void {
        operation.opening = 0;
        operation.file = null;
        @atomicStore(usize, &operation.frame, 0, .release);
        const depth: u32 = @intCast(operation - &thread.operations[0]);
        @atomicStore(u32, &thread.depth, depth, .release);
    }

    /// The topmost operation if it cannot be running any more, seen from `place` in the caller's frame.
    pub fn topDead(thread: *Thread, place: usize) ?*Operation {
        if (thread.depth == 0) return null;
        const operation = &thread.operations[thread.depth - 1];
        if (operation.frame == 0) return null;
        var signal_stack: linux.stack_t = undefined;
        if (system.failure(linux.sigaltstack(null, &signal_stack)) != null) return null;
        if (signal_stack.flags & linux.SS.ONSTACK != 0) return null;
        if (signal_stack.flags & linux.SS.DISABLE == 0) {
            const start = @intFromPtr(signal_stack.sp);
            // Nobody leaves a signal stack but by returning or jumping.
            if (operation.frame >= start and operation.frame < start + signal_stack.size) return operation;
        }
        if (operation.frame > place) return null;
        // Too far away to be the same stack.
        if (place - operation.frame > 8 << 20) return null;
        return operation;
    }

    pub fn hasOpenClaim(thread: *const Thread) bool {
        for (thread.operations[0..thread.depth]) |operation| {
            if (operation.opening != 0) return true;
        }
        return false;
    }

    /// Operations of this thread on `file`, the calling one included.
    pub fn operationsOn(thread: *const Thread, file: *const File) u32 {
        var count: u32 = 0;
        for (thread.operations[0..thread.depth]) |operation| {
            if (operation.file == file) count += 1;
        }
        return count;
    }
};

threadlocal var this_thread: Thread = .{};

/// The calling thread's own. In a fresh child: emptied, for what it says is about the parent's thread.
pub fn current(fork_epoch: u32) *Thread {
    const thread = &this_thread;
    if (thread.fork_epoch != fork_epoch) thread.* = .{ .fork_epoch = fork_epoch };
    return thread;
}

/// Without looking whose it is.
pub fn unchecked() *Thread {
    return &this_thread;
}
