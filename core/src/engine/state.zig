//! What the engine's threads share, and which of them may touch what.

const std = @import("std");
const ring = @import("../format/ring.zig");
const positions = @import("../format/positions.zig");
const os = @import("os.zig");
const Counters = @import("counters.zig").Counters;
const Events = @import("events.zig").Events;
const Publisher = @import("publisher.zig").Publisher;
const RingFile = @import("ring_file.zig").RingFile;
const Route = @import("route.zig").Route;
const File = @import("files.zig").File;
const Mailbox = @import("requests.zig").Mailbox;
const Request = @import("requests.zig").Request;
const EngineKind = @import("disk/applier.zig").EngineKind;

pub const Handle = struct {
    file: ?*File = null,
    session: u64 = 0,
};

pub const State = struct {
    allocator: std.mem.Allocator,
    counters: Counters = .{},
    events: Events,
    publisher: Publisher,
    ring: RingFile,
    /// Measures the ring alone: records are checked and dropped.
    null_sink: bool,
    disk_engine: EngineKind,
    checkpoint_bytes: u64,
    checkpoint_interval_ns: u64,

    /// Append-only: set by the starting or the control thread (release), read by the worker (acquire).
    routes: [positions.routes_max]?*Route = @splat(null),
    route_count: u32 = 0,

    /// Session that each row was given to; 0: free. Given by the control thread, freed by the worker.
    row_sessions: [ring.producer_rows]u64 = @splat(0),
    /// Worker only.
    handles: []Handle,

    to_worker: Mailbox = .{},
    to_control: Mailbox = .{},
    control_eventfd: i32,
    log_directory: [:0]const u8,
    /// Futex of the maintenance thread: moves when there is something for it.
    maintenance_signal: u32 = 0,

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
        const doorbell = &state.ring.view.header().doorbell;
        if (@atomicRmw(u32, doorbell, .Xchg, 0, .seq_cst) == 1) os.futexWake(doorbell, 1);
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
