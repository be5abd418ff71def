//! What comes back from the daemon: how far it is, per route, and each handle's errors. One sealed memfd per
//! ring, which clients map read-only (F_SEAL_FUTURE_WRITE); only the daemon writes it. A restarted daemon makes
//! a new one, and clients that reconnect get it.
//!
//! ```
//! 0        Header
//! 4096     RoutePositions × 1024   (128 bytes each: no two share a cache line)
//! 135168   HandleState × 65536     (32 bytes each)
//! ```

const std = @import("std");
const assert = std.debug.assert;

pub const magic: u64 = std.mem.readInt(u64, "ELGPOSI\x00", .little);
pub const version: u32 = 1;
pub const routes_max: u32 = 1024;
pub const handles_max: u32 = 65536;

pub const Header = extern struct {
    magic: u64,
    version: u32,
    reserved_0: u32,
    /// Drawn at random by each daemon: another value, another daemon.
    daemon_epoch: u64,
    /// Moves when routes change: clients fetch the table again before their next open.
    routes_generation: u32,
    /// Moves when a file gets the mark `user.elgate`, before anybody gets a handle for it.
    marks_generation: u32,
    /// How far the worker has looked: slots from here to the head belong to routes unknown yet.
    scanned: u64 align(128),
    /// The only route with records in the ring (it may use all of it), or `no_sole_route`.
    sole_route: u32,
    /// A robust pthread mutex that the worker holds: when its daemon dies, by whatever way, the kernel marks the first
    /// word, and does so before another daemon can have the log. Who maps this can see by one load that what stands here
    /// is not out of date (see `isServed`).
    server: [64]u8 align(128),
};

/// FUTEX_OWNER_DIED and FUTEX_TID_MASK of linux/futex.h.
const mutex_owner_died: u32 = 0x4000_0000;
const mutex_thread_id_mask: u32 = 0x3fff_ffff;

/// The daemon lives that writes what is mapped here.
pub fn isServed(header: *const Header) bool {
    const word = @atomicLoad(u32, @as(*const u32, @ptrCast(&header.server)), .seq_cst);
    return word & mutex_owner_died == 0 and word & mutex_thread_id_mask != 0;
}

pub const no_sole_route: u32 = std.math.maxInt(u32);

/// Ring positions, exclusive: `durable` = p says that every record of this route below p is durable. `logged` is never
/// behind `durable`; `applied` may be on either side of it.
pub const RoutePositions = extern struct {
    logged: u64,
    durable: u64,
    /// In the target file. Records that a target refused count too: their handles hold the error.
    applied: u64,
    /// Futex. Moves whenever a position moves. A waiter for position p waits with the bit `waitBit(p)`.
    generation: u32,
    /// Not 0: the log of this route has failed with this errno, and new operations get it at once.
    failure_errno: i32,
    /// Slots of the ring that records of this route hold, of those that the worker has seen.
    held_slots: u32,
    /// 1: records become durable late or never by themselves (flush: interval, none). Whoever waits for that puts a
    /// barrier into the ring.
    durable_when_asked: u32,
    /// 1: the route takes nothing that brings new data, since its log is full or its targets do not keep up. Whoever has
    /// some waits, or says EAGAIN or ENOSPC. `generation` moves when this ends.
    closed: u32,
    reserved: [128 - 44]u8,
};

pub const Native = enum(u32) {
    /// Operations go through the ring.
    routed = 0,
    /// A fence is being logged: claim nothing, wait for one of the others.
    undecided = 1,
    /// Whoever writes the file does it natively, until the last handle on it is released.
    native = 2,
    _,
};

pub const HandleState = extern struct {
    /// Moves with each error of the file behind this handle. The client keeps the value it has reported.
    error_sequence: u32,
    error_errno: i32,
    /// End of the last append through this handle: where the kernel's offset would stand. Set before the
    /// append's position is published; read it after.
    append_end: u64,
    /// Somebody makes the file native. Looked at after each claim: whoever has claimed without seeing it stands
    /// below the head that the daemon reads next, and so before the fence.
    native: Native,
    reserved: u32,
    /// Handles that are open on this file, by all sessions. 1: nobody but this handle's owner writes it through
    /// Elgate, so its fsync need not be a barrier in the ring: waiting for its own last position is enough.
    file_handles: u32,
    /// Not 0: the file takes no operations until the fault is mended; they fail with this errno at once.
    failed_errno: i32,
};

pub const routes_offset: usize = 4096;
pub const handles_offset: usize = routes_offset + routes_max * @sizeOf(RoutePositions);
pub const file_size: usize = handles_offset + handles_max * @sizeOf(HandleState);

/// One wake goes to just those whom a group satisfies, as long as no more than 32 records wait.
pub fn waitBit(position: u64) u32 {
    return @as(u32, 1) << @intCast(position % 32);
}

/// The bits of all positions in [from, to).
pub fn wakeMask(from: u64, to: u64) u32 {
    assert(from <= to);
    if (to - from >= 32) return std.math.maxInt(u32);
    const ones: u64 = (@as(u64, 1) << @intCast(to - from)) - 1;
    const turned = ones << @intCast(from % 32);
    return @truncate(turned | turned >> 32);
}

pub const View = struct {
    memory: []align(std.heap.page_size_min) const u8,

    pub fn header(view: View) *const Header {
        return @ptrCast(view.memory.ptr);
    }

    pub fn route(view: View, index: u32) *const RoutePositions {
        assert(index < routes_max);
        const lines: [*]const RoutePositions = @ptrCast(@alignCast(view.memory.ptr + routes_offset));
        return &lines[index];
    }

    pub fn handle(view: View, index: u32) *const HandleState {
        assert(index < handles_max);
        const states: [*]const HandleState = @ptrCast(@alignCast(view.memory.ptr + handles_offset));
        return &states[index];
    }
};

comptime {
    assert(@sizeOf(RoutePositions) == 128);
    assert(@sizeOf(HandleState) == 32);
    assert(@offsetOf(Header, "scanned") == 128);
    assert(@sizeOf(Header) <= routes_offset);
    assert(file_size % 4096 == 0);
}

test "the wake mask of a group holds exactly its members' bits" {
    var from: u64 = 0;
    while (from < 100) : (from += 7) {
        var to = from;
        while (to < from + 40) : (to += 1) {
            var expected: u32 = 0;
            for (from..to) |position| expected |= waitBit(position);
            try std.testing.expectEqual(expected, wakeMask(from, to));
        }
    }
}
