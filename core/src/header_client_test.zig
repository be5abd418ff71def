//! include/elgate_client.h against what the library really exports: constants, structs, signatures.

const std = @import("std");
const testing = std.testing;
const library = @import("elgate_client.zig");
const files = @import("client/files.zig");
const c = @cImport(@cInclude("elgate_client.h"));

fn expectSameStruct(comptime Zig: type, comptime C: type) !void {
    try testing.expectEqual(@sizeOf(C), @sizeOf(Zig));
    const zig_fields = @typeInfo(Zig).@"struct".fields;
    const c_fields = @typeInfo(C).@"struct".fields;
    try testing.expectEqual(c_fields.len, zig_fields.len);
    inline for (zig_fields, c_fields) |zig_field, c_field| {
        try testing.expectEqualStrings(c_field.name, zig_field.name);
        try testing.expectEqual(@offsetOf(C, c_field.name), @offsetOf(Zig, zig_field.name));
        try testing.expectEqual(@sizeOf(c_field.type), @sizeOf(zig_field.type));
    }
}

test "the status struct is the header's" {
    try expectSameStruct(library.Status, c.struct_elgate_client_status);
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

/// What the calling convention sees of a parameter.
const Shape = struct { bytes: usize, pointer: bool, signed: bool };

fn shapeOf(comptime Parameter: type) Shape {
    return switch (@typeInfo(Parameter)) {
        .pointer, .optional => .{ .bytes = @sizeOf(Parameter), .pointer = true, .signed = false },
        .int => |int| .{ .bytes = @sizeOf(Parameter), .pointer = false, .signed = int.signedness == .signed },
        .void => .{ .bytes = 0, .pointer = false, .signed = false },
        else => @compileError("a parameter that the C ABI of Elgate does not use: " ++ @typeName(Parameter)),
    };
}

test "every function of the header is exported with its signature, and nothing else is" {
    @setEvalBranchQuota(1_000_000);
    comptime var declared = 0;
    inline for (@typeInfo(c).@"struct".decls) |declaration| {
        if (comptime !std.mem.startsWith(u8, declaration.name, "elgate_")) continue;
        if (comptime std.mem.eql(u8, declaration.name, "elgate_client_status")) continue;
        declared += 1;
        const theirs = @typeInfo(@TypeOf(@field(c, declaration.name))).@"fn";
        const ours = @typeInfo(@TypeOf(@field(library, declaration.name))).@"fn";
        try testing.expectEqual(theirs.params.len, ours.params.len);
        inline for (theirs.params, ours.params) |their, our| {
            try testing.expectEqual(shapeOf(their.type.?), shapeOf(our.type.?));
        }
        try testing.expectEqual(shapeOf(theirs.return_type.?), shapeOf(ours.return_type.?));
    }
    comptime var exported = 0;
    inline for (@typeInfo(library).@"struct".decls) |declaration| {
        if (comptime std.mem.startsWith(u8, declaration.name, "elgate_")) exported += 1;
    }
    try testing.expectEqual(declared, exported);
    try testing.expect(declared >= 24);
}
