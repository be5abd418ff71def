//! The engine with its test doors open: steps at which it kills itself (engine/steps.zig), and commits that can
//! leave RWF_DSYNC out (ELGATE_NO_SYNC), through the page cache (ELGATE_LOG_BUFFERED), for the tests that show that
//! the power-cut test sees that. For tests alone (hatch_build.py --test-build), never installed.

pub const elgate_test_build = true;

pub const panic = @import("elgate_core.zig").panic;

comptime {
    _ = @import("elgate_core.zig");
}
