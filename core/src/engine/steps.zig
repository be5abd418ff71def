//! Named places where a test build kills the process (SIGKILL, as the kernel would), so that tests hit every step
//! and not only those that take long. In any other build this is nothing at all.
//!
//! A test build is one whose root declares `elgate_test_build` (elgate_core_test_build.zig). There the environment
//! variable ELGATE_KILL_AT names the step and how many times it is passed before: "committed:3".

const std = @import("std");
const root = @import("root");

pub const enabled = @hasDecl(root, "elgate_test_build");

pub const Step = enum {
    /// A batch is copied out of the ring; nothing has been written.
    collected,
    /// Its writes are handed to the target files; the log has nothing of it yet.
    applying,
    /// It is durable in the log; nobody has been told.
    committed,
    /// Positions are published; the ring still holds the slots.
    published,
    /// The slots are free again.
    released,
    /// A file carries the attribute; its identity is not in the log yet.
    marked,
    /// A file that is closed by all is synced; the log does not say yet that nothing is for it any more.
    file_synced,
    /// The log says so, durably; the file carries the attribute still.
    file_released,
    /// Targets are synced for a checkpoint; the cursor is the old one.
    targets_synced,
    /// The cursor is written; the segments below it are still there.
    cursor_written,
};

var armed: ?Step = null;
var remaining: u64 = 0;

/// Starting thread.
pub fn arm() void {
    if (!enabled) return;
    const text = std.posix.getenv("ELGATE_KILL_AT") orelse return;
    var parts = std.mem.splitScalar(u8, text, ':');
    armed = std.meta.stringToEnum(Step, parts.first()) orelse @panic("ELGATE_KILL_AT names no step");
    remaining = std.fmt.parseInt(u64, parts.next() orelse "0", 10) catch @panic("ELGATE_KILL_AT has no number behind the colon");
}

/// Write the log through the page cache although the disk could do without: only so does a power cut that a test
/// makes show a missing sync.
pub fn logIsBuffered() bool {
    return enabled and std.posix.getenv("ELGATE_LOG_BUFFERED") != null;
}

/// Leave every sync of the log out.
pub fn syncsAreLeftOut() bool {
    return enabled and std.posix.getenv("ELGATE_NO_SYNC") != null;
}

pub inline fn reached(comptime step: Step) void {
    if (!enabled) return;
    if (armed != step) return;
    if (remaining > 0) {
        remaining -= 1;
        return;
    }
    std.posix.kill(std.os.linux.getpid(), std.posix.SIG.KILL) catch {};
}
