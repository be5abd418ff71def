//! A mutex for the client's slow paths (open, close, control socket), never taken by a write that finds its file
//! registered and its thread attached.
//!
//! It knows its owner, for two reasons: a signal handler that comes in while its own thread holds the lock gets
//! an error instead of waiting for itself for ever, and a fresh child can set it free whoever held it.

const std = @import("std");
const linux = std.os.linux;
const system = @import("system.zig");

pub const Lock = struct {
    /// 0: free. Else the owner's thread id, and `waiters` if somebody sleeps.
    word: u32 = 0,

    const waiters: u32 = 1 << 31;

    pub fn acquire(lock: *Lock) error{HeldByThisThread}!void {
        const me: u32 = @bitCast(linux.gettid());
        if (@cmpxchgStrong(u32, &lock.word, 0, me, .acquire, .monotonic) == null) return;
        while (true) {
            const seen = @atomicLoad(u32, &lock.word, .monotonic);
            if (seen & ~waiters == me) return error.HeldByThisThread;
            if (seen == 0) {
                // Others may sleep: keep the mark, one wake too many does no harm.
                if (@cmpxchgStrong(u32, &lock.word, 0, me | waiters, .acquire, .monotonic) == null) return;
                continue;
            }
            if (seen & waiters == 0) {
                if (@cmpxchgStrong(u32, &lock.word, seen, seen | waiters, .monotonic, .monotonic) != null) continue;
            }
            _ = system.futexWait(&lock.word, seen | waiters, .private, 100 * std.time.ns_per_ms);
        }
    }

    pub fn release(lock: *Lock) void {
        const before = @atomicRmw(u32, &lock.word, .Xchg, 0, .release);
        if (before & waiters != 0) system.futexWake(&lock.word, 1, .private);
    }

    /// In a fresh child, where the owner does not exist.
    pub fn forget(lock: *Lock) void {
        @atomicStore(u32, &lock.word, 0, .monotonic);
    }
};
