//! Where the worker rests: on its own doorbell and those of all rings at once, for as long as nothing is due. Worker thread.

const std = @import("std");
const os = @import("os.zig");
const release = @import("release.zig");
const syncs = @import("syncs.zig");
const rings_max = @import("served_ring.zig").rings_max;
const Worker = @import("worker.zig").Worker;

/// Bound of every sleep: what should have woken the worker and did not is found this late at the latest.
pub const ns_max = 100 * std.time.ns_per_ms;
/// Open claims are looked at this often, so that a dead producer's is given up well within 50 ms.
const ns_max_passed = 5 * std.time.ns_per_ms;
pub const ns_max_stopping = std.time.ns_per_ms;
/// A sleep that ends sooner was not worth what it costs: a wake of the worker, by whoever has put something into a ring, on
/// a processor that has gone idle. Behind such sleeps the worker looks for as long by itself.
const linger_ns = 50 * std.time.ns_per_us;
/// So many looks in vain, and it sleeps at once again, until a sleep was short.
const lingers_in_vain_max = 4;

/// user_data of completions that are not a file's: 1 for the worker's own doorbell, then one for each ring's.
const user_data_doorbell: u64 = 1;
const doorbells_max = rings_max + 1;

pub const Sleeper = struct {
    /// Those that io_uring waits for.
    doorbells_armed: std.StaticBitSet(doorbells_max) = .initEmpty(),
    /// Looks before a sleep that are left to it.
    lingers_left: u32 = 0,

    /// Of a completion: a doorbell was rung, nothing else.
    pub fn takes(sleeper: *Sleeper, user_data: u64) bool {
        if (user_data >= user_data_doorbell + doorbells_max) return false;
        sleeper.doorbells_armed.unset(user_data - user_data_doorbell);
        return true;
    }
};

/// Until there may be something to do.
pub fn untilCalled(worker: *Worker) void {
    if (linger(worker)) return;
    const before_ns = os.monotonicNs();
    sleep(worker);
    if (os.monotonicNs() - before_ns < linger_ns) worker.sleeper.lingers_left = lingers_in_vain_max;
}

/// Looks for something to do for a moment; whether there is.
fn linger(worker: *Worker) bool {
    if (worker.sleeper.lingers_left == 0) return false;
    // What works for us elsewhere may need this processor.
    if (worker.applier.in_flight > 0 or worker.long_in_flight > 0 or worker.syncs.in_lanes > 0) return false;
    const until_ns = os.monotonicNs() + linger_ns;
    while (os.monotonicNs() < until_ns) {
        for (worker.served()) |each| if (!each.lost and each.consumer.somethingToDo() and worker.buffers.free != null) return true;
        if (@atomicLoad(bool, &worker.state.to_worker.filled, .acquire)) return true;
        std.atomic.spinLoopHint();
    }
    worker.sleeper.lingers_left -= 1;
    return false;
}

fn sleep(worker: *Worker) void {
    const state = worker.state;
    // Publish, full fence, look again: a producer that commits after our look sees the doorbell set.
    setDoorbells(worker, 1);
    var busy = false;
    for (worker.served()) |each| busy = busy or (!each.lost and each.consumer.somethingToDo() and worker.buffers.free != null);
    const results = worker.long_lanes.anyResult() or worker.syncs.lanes.anyResult() or switch (worker.applier.engine) {
        .lanes => |*lanes| lanes.anyResult(),
        .io_uring => false, // waited for together with the doorbells
    };
    if (busy or results or @atomicLoad(bool, &state.to_worker.filled, .seq_cst)) return setDoorbells(worker, 0);
    var limit: u64 = ns_max;
    for (worker.served()) |each| {
        if (each.consumer.passed_count > 0) limit = ns_max_passed;
    }
    for (worker.active[0..worker.active_count]) |route| {
        if (route.unsynced_since_ns != 0 and !route.sync.in_lane) limit = @min(limit, syncs.dueNs(worker, route) -| os.monotonicNs());
    }
    const release_due_ns = worker.releases.dueNs();
    if (release_due_ns != release.never) limit = @min(limit, release_due_ns -| os.monotonicNs());
    if (@atomicLoad(bool, &state.stopping, .acquire) or worker.pending != null) limit = @min(limit, ns_max_stopping);
    state.counters.add(.worker_sleeps_total, 1);
    if (state.disk_engine == .lanes or (worker.applier.in_flight == 0 and worker.sleeper.doorbells_armed.count() == 0)) {
        var doorbells: [doorbells_max]*const u32 = undefined;
        for (0..worker.ring_count + 1) |number| doorbells[number] = doorbell(worker, number);
        os.futexWaitAny(doorbells[0 .. worker.ring_count + 1], 1, limit);
    } else {
        for (0..worker.ring_count + 1) |number| armDoorbell(worker, number);
        worker.uring.submitAndWait(limit);
    }
    setDoorbells(worker, 0);
}

/// The worker's own, then one in each ring.
fn doorbell(worker: *Worker, number: usize) *u32 {
    return if (number == 0) &worker.state.doorbell else &worker.rings[number - 1].view.header().doorbell;
}

fn setDoorbells(worker: *Worker, value: u32) void {
    for (0..worker.ring_count + 1) |number| @atomicStore(u32, doorbell(worker, number), value, .seq_cst);
}

/// A doorbell as a completion, so that one wait serves for both kinds of event.
fn armDoorbell(worker: *Worker, number: usize) void {
    const bit = if (number == 0) 0 else @as(usize, worker.rings[number - 1].index) + 1;
    if (worker.sleeper.doorbells_armed.isSet(bit)) return;
    const entry = worker.uring.prepare() orelse return;
    const futex2_size_u32 = 2;
    entry.opcode = .FUTEX_WAIT;
    entry.fd = futex2_size_u32; // shared: no FUTEX2_PRIVATE
    entry.addr = @intFromPtr(doorbell(worker, number));
    entry.off = 1; // the value to sleep on
    entry.addr3 = std.math.maxInt(u32); // bitset
    entry.user_data = user_data_doorbell + bit;
    worker.sleeper.doorbells_armed.set(bit);
}
