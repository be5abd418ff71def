test {
    _ = @import("engine/bus_guard.zig");
    _ = @import("engine/uring.zig");
    _ = @import("engine/events.zig");
    _ = @import("engine/consumer.zig");
    _ = @import("engine/tails.zig");
    _ = @import("header_core_test.zig");
}
