//! What the engine's threads share, and which of them may touch what.

const std = @import("std");
const positions = @import("../format/positions.zig");
const os = @import("os.zig");
const Counters = @import("counters.zig").Counters;
const Events = @import("events.zig").Events;
const Route = @import("route.zig").Route;
const Mailbox = @import("requests.zig").Mailbox;
const Request = @import("requests.zig").Request;
const EngineKind = @import("disk/applier.zig").EngineKind;
const Stub = @import("stub.zig").Stub;

pub const State = struct {
    allocator: std.mem.Allocator,
    counters: Counters = .{},
    events: Events,
    /// Measures the ring alone: records are checked and dropped.
    null_sink: bool,
    /// In the test stub: where operations are recorded, and faults come from.
    stub: ?*Stub = null,
    disk_engine: EngineKind,
    /// Each client process has a ring of its own; else each user has.
    ring_per_client: bool,
    checkpoint_bytes: u64,
    checkpoint_interval_ns: u64,

    /// Append-only: set by the starting or the control thread (release), read by the worker (acquire).
    routes: [positions.routes_max]?*Route = @splat(null),
    route_count: u32 = 0,

    to_worker: Mailbox = .{},
    to_control: Mailbox = .{},
    /// Futex. 1: the worker sleeps. For wakes from within the daemon; each ring has one for its clients.
    doorbell: u32 align(128) = 0,
    control_eventfd: i32 align(128),
    log_directory: [:0]const u8,
    /// Of the shared ring.
    ring_path: [:0]const u8,
    /// Futex of the maintenance thread: moves when there is something for it.
    maintenance_signal: u32 = 0,

    /// Something was refused for want of a descriptor: files that are closed are let go of at once.
    descriptors_short: bool = false,

    /// Drain, then end. Set by the stopping thread.
    stopping: bool = false,
    /// The worker has ended; it had drained everything.
    worker_ended: u32 = 0,
    drained: bool = false,
    stop_deadline_ns: u64 = 0,

    pub fn route(state: *State, index: u32) *Route {
        return @atomicLoad(?*Route, &state.routes[index], .acquire).?;
    }

    pub fn routeCount(state: *State) u32 {
        return @atomicLoad(u32, &state.route_count, .acquire);
    }

    /// Control thread, or start.
    pub fn addRoute(state: *State, new: *Route) void {
        @atomicStore(?*Route, &state.routes[new.index], new, .release);
        @atomicStore(u32, &state.route_count, new.index + 1, .release);
    }

    pub fn postToWorker(state: *State, request: *Request) void {
        state.to_worker.post(request);
        state.wakeWorker();
    }

    /// Any thread. The worker looks at its mailbox after it has set the doorbell and before it sleeps.
    pub fn wakeWorker(state: *State) void {
        if (@atomicRmw(u32, &state.doorbell, .Xchg, 0, .seq_cst) == 1) os.futexWake(&state.doorbell, 1);
    }

    /// Worker thread.
    pub fn answer(state: *State, request: *Request) void {
        state.to_control.post(request);
        const one: u64 = 1;
        _ = std.os.linux.write(state.control_eventfd, std.mem.asBytes(&one), 8);
    }

    pub fn wakeMaintenance(state: *State) void {
        _ = @atomicRmw(u32, &state.maintenance_signal, .Add, 1, .seq_cst);
        // Two threads wait on it, each for its own kind of work.
        os.futexWake(&state.maintenance_signal, std.math.maxInt(i32));
    }
};
