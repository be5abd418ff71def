//! Whether a route takes what brings new data. It does not while its log has no room behind what may be on its way
//! already, nor while operations wait since its targets do not keep up. Writers wait then, or get an error, by the route's
//! policy (on_full); what was accepted goes on, and so do other routes. Worker thread.

const std = @import("std");
const linux = std.os.linux;
const os = @import("os.zig");
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;
const ServedRing = @import("served_ring.zig").ServedRing;
const buffers = @import("buffers.zig");

pub const Admission = enum(u32) { open, log_full, targets_stalled };

/// A route that is closed for longer than that is news; up to there it is how writers are slowed down.
const news_ns = 200 * std.time.ns_per_ms;

/// What a ring may hold for one route when that is closed, with what belongs to it in the log, fits in a buffer's length.
/// (With more rings than one there may be more: it stays in them until there is room.)
fn reserveBytes(route: *const Route) u64 {
    return @min(buffers.buffer_bytes, route.log.groupBytesMax() / 2);
}

fn judge(route: *const Route, may_fill: bool) Admission {
    if (!may_fill) return .targets_stalled;
    if (isSpaceErrno(route.failed_errno)) return .log_full;
    return if (route.log.admits(reserveBytes(route))) .open else .log_full;
}

fn isSpaceErrno(errno: i32) bool {
    return errno == @intFromEnum(linux.E.NOSPC) or errno == @intFromEnum(linux.E.DQUOT);
}

/// Of an active route, once in each batch. `may_fill`: it may have another log buffer.
pub fn update(state: *State, rings: []const *ServedRing, route: *Route, may_fill: bool) void {
    const is_full = if (state.stub) |stub| stub.isFull(route) else false;
    const admission = if (is_full) .log_full else judge(route, may_fill);
    const before = route.admission;
    if (admission == before) return;
    @atomicStore(Admission, &route.admission, admission, .seq_cst);
    if (before == .open) {
        route.closed_at_ns = os.monotonicNs();
        state.counters.add(.admissions_closed_total, 1);
    }
    for (rings) |each| each.publisher.setClosed(route.index, admission != .open);
    if (admission != .open) return;
    if (route.closed_is_news) state.events.post(.info, "route_opened", .{ .route = route.name });
    route.closed_is_news = false;
}

/// Now and then, of every route.
pub fn tick(state: *State, route: *Route, now: u64) void {
    if (route.admission == .open) return;
    if (!route.closed_is_news and now -| route.closed_at_ns >= news_ns) {
        route.closed_is_news = true;
        state.events.post(.warning, "route_closed", .{ .route = route.name, .reason = switch (route.admission) {
            .open => unreachable,
            .log_full => "its log is full: the disk is, or wal.max_size is reached and its targets take nothing",
            .targets_stalled => "its targets do not keep up: a disk hangs, or is too slow",
        } });
    }
    if (route.admission != .log_full) return;
    route.log.prepareAnew();
    state.wakeMaintenance();
}
