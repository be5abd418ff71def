//! What of the logs must not hold up the worker: segments made ready ahead of need, and the cursors of checkpoints. Each
//! has a thread of its own, so that a cursor whose write hangs does not keep the logs from growing.

const std = @import("std");
const os = @import("os.zig");
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;
const Admission = @import("admission.zig").Admission;
const steps = @import("steps.zig");
const log_module = @import("wal/log.zig");
const storage_module = @import("wal/storage.zig");
const checkpoint_module = @import("wal/checkpoint.zig");

/// Bound of a sleep that nothing ended.
const sleep_ns_max = std.time.ns_per_s;

/// Thread body: prepares segments until the worker has ended.
pub fn prepareSegments(state: *State) void {
    runUntilEnd(state, struct {
        fn once(s: *State, route: *Route) void {
            if (!route.log.needsPreparation()) return;
            // Failure here is no news yet: the worker meets it when it needs the segment, and says so then.
            route.log.prepareNextSegment() catch return;
            if (@atomicLoad(Admission, &route.admission, .seq_cst) != .open) s.wakeWorker();
        }
    }.once);
}

/// Thread body: writes the cursors of the checkpoints whose targets the worker has had synced, until the worker has ended.
pub fn checkpointRoutes(state: *State) void {
    runUntilEnd(state, struct {
        fn once(s: *State, route: *Route) void {
            const job = &route.checkpoint;
            // A failure is no news: it is tried again in a second.
            defer if (route.log.historyIsDue()) route.log.trimHistory() catch {};
            if (@atomicLoad(@TypeOf(job.state), &job.state, .acquire) != .requested) return;
            const succeeded = checkpoint(s, route);
            @atomicStore(@TypeOf(job.state), &job.state, if (succeeded) .done else .failed, .release);
            if (@atomicLoad(Admission, &route.admission, .seq_cst) != .open) s.wakeWorker();
        }
    }.once);
}

fn runUntilEnd(state: *State, once: *const fn (*State, *Route) void) void {
    while (true) {
        const signal = @atomicLoad(u32, &state.maintenance_signal, .seq_cst);
        const ended = @atomicLoad(u32, &state.worker_ended, .acquire) != 0;
        for (0..state.routeCount()) |index| once(state, state.route(@intCast(index)));
        if (ended) return;
        os.futexWait(&state.maintenance_signal, signal, sleep_ns_max);
    }
}

/// false: the cursor is where it was, and why stands in the job.
fn checkpoint(state: *State, route: *Route) bool {
    checkpoint_module.run(route.log, route.checkpoint.lsn, Steps{ .state = state, .route = route }) catch |err| switch (err) {
        error.TargetsNotSynced, error.CursorNotWritten => return false,
        error.SegmentsNotRemoved => {},
    };
    if (route.log.takeHistoryFailure()) |err| {
        state.events.post(.warning, "history_not_kept", .{ .route = route.name, .@"error" = @errorName(err) });
    }
    return true;
}

const Steps = struct {
    state: *State,
    route: *Route,

    /// Their lanes have done that before the job came here (see Worker.checkpoint).
    pub fn syncTargets(_: Steps) bool {
        steps.reached(.targets_synced);
        return true;
    }

    pub fn cursorWritten(_: Steps) void {
        steps.reached(.cursor_written);
    }

    pub fn cursorFailed(self: Steps, err: storage_module.Error) void {
        const job = &self.route.checkpoint;
        self.state.events.post(.@"error", "checkpoint_failed", .{ .route = self.route.name, .lsn = job.lsn, .@"error" = @errorName(err) });
    }

    /// They are tried again with the next checkpoint.
    pub fn removalFailed(self: Steps, err: storage_module.Error) void {
        self.state.events.post(.warning, "segments_not_removed", .{ .route = self.route.name, .@"error" = @errorName(err) });
    }

    pub fn mayRemove(self: Steps) log_module.MayRemove {
        return .{ .context = self.state, .ask = yes };
    }

    /// The checkpoint was only asked for when the ring had released all that it covers, so no later daemon can find
    /// an operation in the ring that stands in a segment below it: whatever is below may go.
    fn yes(_: *anyopaque, _: *const log_module.SegmentSummary) bool {
        return true;
    }
};
