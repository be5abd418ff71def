//! include/elgate_core.h against what the library really exports: constants, structs, signatures.

const std = @import("std");
const testing = std.testing;
const library = @import("elgate_core.zig");
const stub = @import("engine/stub.zig");
const header = @import("testing/header.zig");
const c = @cImport(@cInclude("elgate_core.h"));

test "the structs are the header's" {
    try header.expectSameStruct(library.RouteConfig, c.struct_elgate_route_config);
    try header.expectSameStruct(library.EngineConfig, c.struct_elgate_engine_config);
    try header.expectSameStruct(library.StubRule, c.struct_elgate_stub_rule);
    try header.expectSameStruct(library.StubOperation, c.struct_elgate_stub_operation);
    try header.expectSameStruct(library.StubState, c.struct_elgate_stub_state);
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

test "the test stub's constants are the header's" {
    inline for (@typeInfo(stub.Kind).@"enum".fields) |field| {
        try testing.expectEqual(@field(c, "ELGATE_STUB_" ++ upper(field.name)), field.value);
    }
    inline for (@typeInfo(stub.Point).@"enum".fields) |field| {
        try testing.expectEqual(@field(c, "ELGATE_STUB_AT_" ++ upper(field.name)), field.value);
    }
}

fn upper(comptime name: []const u8) *const [name.len]u8 {
    comptime {
        var text: [name.len]u8 = undefined;
        const made = std.ascii.upperString(&text, name);
        const kept = made[0..name.len].*;
        return &kept;
    }
}

test "every function of the header is exported with its signature, and nothing else is" {
    try testing.expect(try header.expectSameFunctions(c, library) >= 9);
}
