//! Checkpoints, as the worker makes them: what a route's log holds below one is in its files, durably, and is not replayed
//! any more.
//!
//! ```
//! due ─▶ identities of open files logged anew ─▶ files synced (their lanes), log synced ─▶ cursor written (maintenance)
//! ```
//!
//! Worker thread.

const std = @import("std");
const assert = std.debug.assert;
const os = @import("os.zig");
const File = @import("files.zig").File;
const Route = @import("route.zig").Route;
const names = @import("names.zig");
const Worker = @import("worker.zig").Worker;

/// Begins a checkpoint when one is due, and takes the result of the last.
pub fn tick(worker: *Worker, route: *Route, now: u64) void {
    const state = worker.state;
    const job = &route.checkpoint;
    switch (@atomicLoad(@TypeOf(job.state), &job.state, .acquire)) {
        .syncing, .requested => return,
        .idle => {},
        .done => {
            state.counters.add(.checkpoints_total, 1);
            job.last_lsn = job.lsn;
            job.cursor_failed = false;
            @atomicStore(@TypeOf(job.state), &job.state, .idle, .release);
            for (worker.known_files.items) |file| {
                if (file.route == route.index) worker.offerFile(file);
            }
        },
        .failed => {
            // The targets are synced, and nothing is removed: the next one writes the cursor.
            state.counters.add(.checkpoint_failures_total, 1);
            job.cursor_failed = true;
            @atomicStore(@TypeOf(job.state), &job.state, .idle, .release);
        },
    }
    const stopping = @atomicLoad(bool, &state.stopping, .acquire) and !job.cursor_failed;
    const due = route.bytes_since_checkpoint >= state.checkpoint_bytes or now - job.last_ns >= state.checkpoint_interval_ns or stopping or route.admission == .log_full;
    job.waits = false;
    if (!due or route.data_lsn <= job.last_lsn or route.applied_lsn <= job.last_lsn) return;
    if (route.buffer != null and route.failed_errno == 0) {
        job.waits = true; // with the next tick: until then no group gathers in the ring
        return;
    }
    for (worker.served()) |each| {
        // A record that a ring still holds must stay in the log, or the next daemon would take it again.
        if (!each.recovery_over) return;
        if (each.lost or each.consumer.tail == each.consumer.scan) continue;
        // What is in no log yet, and may stay so for long, holds up no checkpoint.
        each.consumer.leave_held = true;
        return;
    }
    if (route.buffer != null or route.replayed.items.len > 0) return; // the log does not take anything now
    // What is not durable is not covered, and a route may have nothing else that would make it so.
    if (route.unsynced_since_ns != 0) route.sync_wanted = true;
    const lsn = @min(route.applied_lsn, route.log.durableLsn(), cursorLimit(worker, route));
    if (lsn <= job.last_lsn) return;
    job.last_ns = now;
    job.lsn = lsn;
    route.bytes_since_checkpoint = 0;
    // The log below will go: who is still open must be known above.
    for (worker.known_files.items) |file| {
        if (file.route != route.index or !needsIdentity(file, job.lsn)) continue;
        if (!worker.hasRoom() or !names.logAnew(worker, file, route)) {
            commitOpen(worker, route);
            if (!names.logAnew(worker, file, route)) return;
        }
    }
    commitOpen(worker, route);
    if (route.failed_errno != 0) return;
    job.identities_lsn = route.log.nextLsn() - 1;
    if (route.log.hasUncovered()) route.sync_wanted = true;
    for (worker.known_files.items) |file| {
        if (file.route != route.index) continue;
        if (file.syncing) {
            // To be let go of: what that sync covers is not certain yet.
            job.lsn = @min(job.lsn, file.syncing_lsn - 1);
            continue;
        }
        const is_unsynced = file.unsynced_lsn != 0 and file.unsynced_lsn <= job.lsn;
        if (!is_unsynced and (file.naming.former.len == 0 or file.rewrite_lsn != 0)) continue;
        assert(file.rewrite_lsn == 0); // see cursorLimit
        file.errand = .sync;
        // A queue that is full, or a fence's sync under way: the next one takes it.
        if (file.queue_syncing or !worker.giveErrand(file)) {
            if (is_unsynced) job.lsn = @min(job.lsn, file.unsynced_lsn - 1);
            continue;
        }
        job.syncs += 1;
        file.syncing = true;
        if (!is_unsynced) continue; // its name alone
        file.syncing_lsn = file.unsynced_lsn;
        // What stands above the checkpoint is not in the file for certain: the next one syncs it again.
        file.unsynced_lsn = if (file.last_lsn > job.lsn) job.lsn + 1 else 0;
    }
    job.state = .syncing;
    writeCursor(worker, route);
}

/// Something of the file may have to be placed by what the log holds above a checkpoint at `lsn`, or above where that
/// ends up if not all of the file's syncs are back.
fn needsIdentity(file: *const File, lsn: u64) bool {
    if (file.handle_list.items.len != 0) return true;
    if (file.release.lsn > file.last_lsn) return false; // nothing is for it any more
    return file.last_lsn > lsn or !file.queue.isEmpty() or file.rewrite_lsn != 0 or file.syncing or file.unsynced_lsn != 0;
}

/// No checkpoint passes what a target does not have for certain.
fn cursorLimit(worker: *const Worker, route: *const Route) u64 {
    if (route.failed_files == 0) return std.math.maxInt(u64);
    var limit: u64 = std.math.maxInt(u64);
    for (worker.known_files.items) |file| {
        if (file.route != route.index or file.rewrite_lsn == 0) continue;
        limit = @min(limit, file.rewrite_lsn - 1);
        if (file.unsynced_lsn != 0) limit = @min(limit, file.unsynced_lsn - 1);
    }
    return limit;
}

/// Once all of a checkpoint's syncs have come back, and the log above it is durable as far as files are named there.
pub fn writeCursor(worker: *Worker, route: *Route) void {
    const job = &route.checkpoint;
    if (job.state != .syncing or job.syncs > 0 or route.log.durableLsn() < job.identities_lsn) return;
    job.lsn = @min(job.lsn, cursorLimit(worker, route));
    if (job.lsn <= job.last_lsn) {
        job.lsn = job.last_lsn;
        job.state = .idle;
        return;
    }
    @atomicStore(@TypeOf(job.state), &job.state, .requested, .release);
    worker.state.wakeMaintenance();
}

fn commitOpen(worker: *Worker, route: *Route) void {
    if (route.buffer) |buffer| worker.commitRoute(route, buffer); // identities only: nothing to apply
}
