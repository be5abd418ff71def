//! Makes durable what is only logged. Each route's log is synced on a thread of its own, while the worker writes on behind
//! what the sync covers; positions, ages and answers follow when it is back. Worker thread, but for `perform`.
//!
//! In a route that syncs each group this is how a ring is kept going that nobody waits in: a group is committed durably
//! by one write of the worker as long as the ring has room (one wake less for those who wait for it); where it has not, the
//! group is written through the page cache, its slots are given back, and all that gathers so is synced at once.

const std = @import("std");
const assert = std.debug.assert;
const os = @import("os.zig");
const checkpoints = @import("checkpoints.zig");
const lanes_module = @import("disk/lanes.zig");
const log_module = @import("wal/log.zig");
const tails_module = @import("tails.zig");
const counters_module = @import("counters.zig");
const Route = @import("route.zig").Route;
const Worker = @import("worker.zig").Worker;

const Lanes = lanes_module.Lanes(Route);

/// A log that has failed is tried again this often.
pub const retry_interval_ns = 100 * std.time.ns_per_ms;

/// Of a route: the sync that was begun last.
pub const Sync = struct {
    /// Its thread has it, or has had it and the worker has not heard yet.
    in_lane: bool = false,
    began_ns: u64 = 0,
    /// It covers the log's records up to here.
    lsn: u64 = 0,
    /// When the oldest of them was made; `Route.no_record`: not known.
    oldest_ns: u64 = Route.no_record,
};

pub const Syncs = struct {
    lanes: Lanes = undefined,
    in_lanes: u32 = 0,

    pub fn init(syncs: *Syncs, worker: *Worker) void {
        syncs.lanes = .{ .allocator = worker.state.allocator, .doorbell = &worker.state.doorbell, .perform = perform };
    }

    fn perform(route: *Route) i32 {
        route.log.performSync();
        return 0; // the log keeps what became of it
    }

    /// Behind the publication of a batch: who waits for what is only logged does not wait for a sync. Begins those that
    /// are due. Whether there were any.
    pub fn begin(syncs: *Syncs, worker: *Worker) bool {
        var any = false;
        for (worker.active[0..worker.active_count]) |route| {
            if (isDue(worker, route)) {
                any = true;
                if (route.log.broken != null or !syncs.beginOne(worker, route)) _ = now(worker, route);
            }
            // A barrier that waits for other rings, or stands behind a fence, speaks for what is still to come.
            if (route.buffer == null and !route.log.hasUncovered() and !worker.isGated(route)) route.sync_wanted = false;
        }
        return any;
    }

    /// false: no thread is to be had for it.
    fn beginOne(syncs: *Syncs, worker: *Worker, route: *Route) bool {
        const lane = syncs.lanes.laneOf(route.index) orelse return false;
        const sync = &route.sync;
        sync.* = .{ .in_lane = true, .began_ns = os.monotonicNs(), .lsn = route.log.nextLsn() - 1, .oldest_ns = route.oldest_undurable_ns };
        route.oldest_undurable_ns = Route.no_record;
        route.unsynced_since_ns = 0;
        for (worker.served()) |each| each.lines[route.index].covered_position = each.publisher.route(route.index).logged;
        route.log.beginSync();
        syncs.in_lanes += 1;
        assert(Lanes.give(lane, route)); // a route is in its lane once
        syncs.lanes.wakeAll();
        return true;
    }

    /// Ends the syncs that have come back. Whether there were any.
    pub fn take(syncs: *Syncs, worker: *Worker) bool {
        var any = false;
        while (syncs.lanes.take()) |result| {
            any = true;
            const route = result.item;
            syncs.in_lanes -= 1;
            route.sync.in_lane = false;
            // Else the worker has had to wait for it, and has ended it.
            if (route.log.isSyncing()) {
                route.log.endSync() catch |err| {
                    failed(worker, route, log_module.errnoOf(err), @errorName(err));
                    continue;
                };
            }
            if (route.log.durableLsn() >= route.sync.lsn) ended(worker, route);
        }
        return any;
    }

    /// What it covers is durable.
    fn ended(worker: *Worker, route: *Route) void {
        const ended_ns = os.monotonicNs();
        worker.state.counters.add(.syncs_total, 1);
        worker.state.counters.add(.sync_ns_total, ended_ns - route.sync.began_ns);
        countAge(worker, &route.sync.oldest_ns, ended_ns);
        takeTailsBack(worker, route);
        for (worker.served()) |each| {
            const line = each.publisher.route(route.index);
            Worker.publishPositions(each, route, line.logged, each.lines[route.index].covered_position, line.applied);
        }
        if (!route.log.hasUnsynced()) recovered(worker, route);
        worker.answerCommitted(route.index, 0);
        checkpoints.writeCursor(worker, route);
        // One that failed at first has taken another segment.
        if (route.log.needsPreparation()) worker.state.wakeMaintenance();
    }
};

/// On the worker: all that is in the route's log is durable, and said to be. false: those who wait have been told why not.
pub fn now(worker: *Worker, route: *Route) bool {
    const began_ns = os.monotonicNs();
    route.log.sync() catch |err| {
        failed(worker, route, log_module.errnoOf(err), @errorName(err));
        return false;
    };
    const ended_ns = os.monotonicNs();
    worker.state.counters.add(.syncs_total, 1);
    worker.state.counters.add(.sync_ns_total, ended_ns - began_ns);
    becameDurable(worker, route, ended_ns);
    recovered(worker, route);
    worker.answerCommitted(route.index, 0);
    if (route.log.needsPreparation()) worker.state.wakeMaintenance();
    return true;
}

/// All that is in the log is.
pub fn becameDurable(worker: *Worker, route: *Route, now_ns: u64) void {
    assert(!route.log.hasUnsynced());
    route.unsynced_since_ns = 0;
    takeTailsBack(worker, route);
    countAge(worker, &route.sync.oldest_ns, now_ns);
    countAge(worker, &route.oldest_undurable_ns, now_ns);
    // Of what is published as logged, all.
    for (worker.served()) |each| {
        const line = each.publisher.route(route.index);
        Worker.publishPositions(each, route, line.logged, line.logged, line.applied);
    }
    checkpoints.writeCursor(worker, route);
}

fn takeTailsBack(worker: *Worker, route: *Route) void {
    while (route.log.takeTailBack()) |memory| worker.tails.give(memory);
}

fn countAge(worker: *Worker, oldest_ns: *u64, now_ns: u64) void {
    if (oldest_ns.* == Route.no_record) return;
    worker.state.counters.add(counters_module.ofAge(now_ns -| oldest_ns.*), 1);
    oldest_ns.* = Route.no_record;
}

fn recovered(worker: *Worker, route: *Route) void {
    // What stands in a buffer that was refused is in no log yet.
    if (route.failed_errno != 0 and route.buffer == null) worker.logRecovered(route);
}

/// Not even another segment has taken what is not durable: it stays in memory, and is tried again.
fn failed(worker: *Worker, route: *Route, errno: i32, name: []const u8) void {
    worker.state.counters.add(.log_failures_total, 1);
    if (route.failed_errno == 0) {
        worker.postLogFailed(route, errno, name);
        worker.reportUndurable(route, errno, route.log.nextLsn());
    }
    worker.setFailed(route, errno);
    if (route.unsynced_since_ns == 0) route.unsynced_since_ns = os.monotonicNs();
    if (route.buffer == null) worker.answerCommitted(route.index, errno);
}

fn isDue(worker: *const Worker, route: *const Route) bool {
    return route.unsynced_since_ns != 0 and !route.sync.in_lane and os.monotonicNs() >= dueNs(worker, route);
}

/// Of a route with records that no sync covers.
pub fn dueNs(worker: *const Worker, route: *const Route) u64 {
    assert(route.unsynced_since_ns != 0);
    if (route.failed_errno != 0) return route.failed_at_ns + retry_interval_ns;
    if (route.sync_wanted or worker.isAwaited(route) or @atomicLoad(bool, &worker.state.stopping, .acquire)) return 0;
    // Whatever keeps checkpoints from being made does not keep records from becoming durable.
    const checkpoint_due_ns = route.unsynced_since_ns + worker.state.checkpoint_interval_ns;
    return @min(route.flushMode().dueNs(route.unsynced_since_ns), checkpoint_due_ns);
}

/// Memory for what is not synced; null: all is lent, and the disk does not let go of any.
pub fn takeTail(worker: *Worker) ?tails_module.Memory {
    if (worker.tails.take()) |memory| return memory;
    var oldest: ?*Route = null;
    for (worker.active[0..worker.active_count]) |route| {
        if (!route.log.hasUnsynced() or route.failed_errno != 0) continue;
        if (oldest == null or sinceNs(route) < sinceNs(oldest.?)) oldest = route;
    }
    if (!now(worker, oldest orelse return null)) return null;
    return worker.tails.take();
}

fn sinceNs(route: *const Route) u64 {
    return if (route.log.isSyncing()) route.sync.began_ns else route.unsynced_since_ns;
}
