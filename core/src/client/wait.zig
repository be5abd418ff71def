//! Waiting for the daemon: for a position of a route, and for space in the ring. Every sleep is bounded and
//! followed by another look; a wake that comes late is counted, not trusted.

const std = @import("std");
const ring = @import("../format/ring.zig");
const positions = @import("../format/positions.zig");
const system = @import("system.zig");

/// One sleep. Nobody should ever need it: it bounds what a lost wake costs, and how late a death is noticed.
pub const slice_ns: u64 = 100 * std.time.ns_per_ms;

pub const no_deadline: u64 = std.math.maxInt(u64);

/// Of the process (elgate_answer_signals): a wait that a signal handler has run in ends with -EINTR, so that a runtime
/// whose own handlers run between calls gets to run them. Only where nothing has been done yet, so that the caller can
/// ask again; and not by a signal that comes in the moment before the sleep, as with any system call.
pub var signals_end_waits = false;

/// How the calling thread waits just now. Entry points of the library set it and put back what was before, so that
/// one that a signal handler calls does not change what it has interrupted.
pub const Patience = struct {
    /// Waits for positions and for the daemon end then, whatever else holds.
    deadline_ns: u64 = no_deadline,
    /// The operation has taken effect, or is half done: signals do not end its waits.
    committed: bool = false,

    pub fn isOver(given: Patience) bool {
        return given.deadline_ns != no_deadline and system.monotonicNs() >= given.deadline_ns;
    }
};

pub threadlocal var patience: Patience = .{};

pub fn isEnded(woken: system.Woken) bool {
    return woken == .interrupted and @atomicLoad(bool, &signals_end_waits, .monotonic) and !patience.committed;
}

/// For the rest of an operation that cannot be begun again. Give what it returns to `resumeSignals`.
pub fn ignoreSignals() bool {
    const before = patience.committed;
    patience.committed = true;
    return before;
}

pub fn resumeSignals(before: bool) void {
    patience.committed = before;
}

/// What must have passed the position.
pub const Levels = packed struct {
    logged: bool = false,
    durable: bool = false,
    applied: bool = false,
};

pub fn reached(line: *const positions.RoutePositions, position: u64, levels: Levels) bool {
    if (levels.logged and @atomicLoad(u64, &line.logged, .acquire) <= position) return false;
    if (levels.durable and @atomicLoad(u64, &line.durable, .acquire) <= position) return false;
    if (levels.applied and @atomicLoad(u64, &line.applied, .acquire) <= position) return false;
    return true;
}

/// Sleeps once, until the route's positions move past `generation` (read before they were compared).
pub fn forPosition(line: *const positions.RoutePositions, generation: u32, position: u64, deadline_ns: u64) system.Woken {
    const until = @min(deadline_ns, system.monotonicNs() + slice_ns);
    return system.futexWaitBits(&line.generation, generation, positions.waitBit(position), until);
}

/// Sleeps once, until the route may take new data again (`generation`: read before it was asked).
pub fn forAdmission(line: *const positions.RoutePositions, generation: u32) system.Woken {
    return system.futexWaitBits(&line.generation, generation, positions.waitBit(0), system.monotonicNs() + slice_ns);
}

/// A producer that wants space. Between `begin` and `sleep` the caller looks once more: a release after `begin`
/// moves the sequence and the sleep ends at once.
pub const Space = struct {
    header: *ring.Header,
    sequence: u32,

    pub fn begin(view: ring.View) Space {
        const header = view.header();
        _ = @atomicRmw(u32, &header.space_waiters, .Add, 1, .seq_cst);
        return .{ .header = header, .sequence = @atomicLoad(u32, &header.space_sequence, .seq_cst) };
    }

    pub fn sleep(space: Space) system.Woken {
        return system.futexWait(&space.header.space_sequence, space.sequence, .shared, slice_ns);
    }

    pub fn end(space: Space) void {
        _ = @atomicRmw(u32, &space.header.space_waiters, .Sub, 1, .seq_cst);
    }
};

/// The sleep ran out although what was waited for had come.
pub fn countLateWake(view: ring.View) void {
    _ = @atomicRmw(u64, &view.header().late_wakes, .Add, 1, .monotonic);
}
