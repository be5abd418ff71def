//! The one order in which a checkpoint is made, whatever cuts it short: the targets, then the cursor, then the
//! segments below it. So the log still holds all that may not be in a target, and never lacks what a cursor that may
//! be read asks for.

const log_module = @import("log.zig");
const Log = log_module.Log;
const mutant = @import("mutant.zig");

/// Which step failed; those behind it were not begun. `steps` has the words.
pub const Error = error{ TargetsNotSynced, CursorNotWritten, SegmentsNotRemoved };

/// Maintenance thread. `lsn`: all records up to it are applied.
///
/// `steps` has
///     syncTargets() bool                  makes all that is applied durable; false: it could not
///     cursorWritten() void
///     cursorFailed(err) void, removalFailed(err) void
///     mayRemove() log_module.MayRemove
/// A segment that could not be removed is tried again with the next checkpoint.
pub fn run(log: *Log, lsn: u64, steps: anytype) Error!void {
    if (mutant.is(.cursor_before_targets)) log.checkpoint(lsn) catch return error.CursorNotWritten;
    if (mutant.is(.segments_before_cursor)) {
        log.applied_lsn = lsn;
        log.applied_lsn_before = lsn;
        log.collect(steps.mayRemove()) catch return error.SegmentsNotRemoved;
    }
    if (!steps.syncTargets()) return error.TargetsNotSynced;
    log.checkpoint(lsn) catch |err| {
        steps.cursorFailed(err);
        return error.CursorNotWritten;
    };
    steps.cursorWritten();
    log.collect(steps.mayRemove()) catch |err| {
        steps.removalFailed(err);
        return error.SegmentsNotRemoved;
    };
}
