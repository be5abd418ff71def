//! How a C header is held against the Zig code that implements it: structs field by field, functions by what the
//! calling convention sees of their parameters.

const std = @import("std");
const testing = std.testing;

pub fn expectSameStruct(comptime Zig: type, comptime C: type) !void {
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

/// Every function `elgate_…` of the header is exported by `library` with its signature, and nothing else is. Returns
/// how many there are.
pub fn expectSameFunctions(comptime c: type, comptime library: type) !usize {
    @setEvalBranchQuota(1_000_000);
    comptime var declared = 0;
    inline for (@typeInfo(c).@"struct".decls) |declaration| {
        if (comptime !std.mem.startsWith(u8, declaration.name, "elgate_")) continue;
        if (comptime @TypeOf(@field(c, declaration.name)) == type) continue; // a struct's name
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
    return declared;
}
