//! include/elgate_client.h against what the library really exports: constants, structs, signatures.

const std = @import("std");
const testing = std.testing;
const library = @import("elgate_client.zig");
const files = @import("client/files.zig");
const header = @import("testing/header.zig");
const c = @cImport(@cInclude("elgate_client.h"));

test "the status struct is the header's" {
    try header.expectSameStruct(library.Status, c.struct_elgate_client_status);
}

test "a vector is the system's iovec" {
    try testing.expectEqual(@sizeOf(c.struct_iovec), @sizeOf(files.Vector));
    try testing.expectEqual(@offsetOf(c.struct_iovec, "iov_base"), @offsetOf(files.Vector, "base"));
    try testing.expectEqual(@offsetOf(c.struct_iovec, "iov_len"), @offsetOf(files.Vector, "length"));
}

test "the constants are the header's" {
    try testing.expectEqual(c.ELGATE_NATIVE, files.native);
    inline for (@typeInfo(files.Level).@"enum".fields) |field| {
        try testing.expectEqual(@field(c, "ELGATE_" ++ upper(field.name)), field.value);
    }
    inline for (@typeInfo(files.Reason).@"enum".fields) |field| {
        try testing.expectEqual(@field(c, "ELGATE_REASON_" ++ upper(field.name)), field.value);
    }
}

fn upper(comptime name: []const u8) *const [name.len]u8 {
    comptime {
        var text: [name.len]u8 = undefined;
        _ = std.ascii.upperString(&text, name);
        const final = text;
        return &final;
    }
}

test "every function of the header is exported with its signature, and nothing else is" {
    try testing.expect(try header.expectSameFunctions(c, library) >= 24);
}
