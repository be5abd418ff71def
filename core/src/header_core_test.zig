//! include/elgate_core.h against what the library really exports: constants, structs, signatures.

const std = @import("std");
const testing = std.testing;
const library = @import("elgate_core.zig");
const header = @import("testing/header.zig");
const c = @cImport(@cInclude("elgate_core.h"));

test "the structs are the header's" {
    try header.expectSameStruct(library.RouteConfig, c.struct_elgate_route_config);
    try header.expectSameStruct(library.EngineConfig, c.struct_elgate_engine_config);
}

test "the constants are the header's" {
    try testing.expectEqual(c.ELGATE_FLUSH_GROUP, library.flush_group);
    try testing.expectEqual(c.ELGATE_FLUSH_ALWAYS, library.flush_always);
    try testing.expectEqual(c.ELGATE_FLUSH_INTERVAL, library.flush_interval);
    try testing.expectEqual(c.ELGATE_FLUSH_NONE, library.flush_none);
    try testing.expectEqual(c.ELGATE_FLUSH_INTERVAL_MS_MAX, library.flush_interval_ms_max);
    try testing.expectEqual(c.ELGATE_VISIBILITY_IMMEDIATE, library.visibility_immediate);
    try testing.expectEqual(c.ELGATE_ON_FULL_ERROR, library.on_full_error);
    try testing.expectEqual(c.ELGATE_ENGINE_ALLOW_VOLATILE, library.flag_allow_volatile);
    try testing.expectEqual(c.ELGATE_ENGINE_NULL_SINK, library.flag_null_sink);
    try testing.expectEqual(c.ELGATE_ENGINE_IO_URING, library.flag_io_uring);
    try testing.expectEqual(c.ELGATE_ENGINE_RING_PER_CLIENT, library.flag_ring_per_client);
}

test "every function of the header is exported with its signature, and nothing else is" {
    try testing.expect(try header.expectSameFunctions(c, library) >= 9);
}
