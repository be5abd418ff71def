//! The one true path of a file: absolute, without symlinks, as routes are matched.

const std = @import("std");
const linux = std.os.linux;
const system = @import("system.zig");

pub const bytes_max = linux.PATH_MAX;
pub const Buffer = [bytes_max]u8;

/// Of an open descriptor, by the kernel's own word. null where /proc is not to be had.
pub fn ofDescriptor(fd: i32, buffer: *Buffer) ?[]const u8 {
    var name: [32]u8 = undefined;
    const link = std.fmt.bufPrintZ(&name, "/proc/self/fd/{d}", .{fd}) catch return null;
    const length = linux.readlink(link, buffer, buffer.len);
    if (system.failure(length) != null or length == 0 or length == buffer.len) return null;
    if (buffer[0] != '/') return null;
    return buffer[0..length];
}

/// The kernel's own limit for symlinks in one look-up.
const symlinks_max = 40;

/// Where an open of `path` with O_CREAT would land, whether the file exists or not. null: nowhere (a directory is
/// missing, a loop, a name too long).
pub fn resolve(path: [*:0]const u8, buffer: *Buffer) ?[]const u8 {
    var wanted: [bytes_max:0]u8 = undefined;
    const given = std.mem.span(path);
    if (given.len == 0 or given.len >= bytes_max) return null;
    @memcpy(wanted[0 .. given.len + 1], given[0 .. given.len + 1]);
    var length = given.len;
    for (0..symlinks_max) |_| {
        // O_PATH opens nothing of the file itself, and its close drops no POSIX lock of the application.
        const whole = linux.open(&wanted, .{ .PATH = true, .CLOEXEC = true }, 0);
        if (system.failure(whole) == null) {
            const fd: i32 = @intCast(whole);
            defer system.close(fd);
            return ofDescriptor(fd, buffer);
        }
        if (system.failure(whole) != .NOENT) return null;

        // The last component may be missing, or be a symlink that dangles: then its target is what is made.
        const slash = std.mem.lastIndexOfScalar(u8, wanted[0..length], '/');
        const name_start = if (slash) |index| index + 1 else 0;
        if (name_start == length) return null;
        var name: [256:0]u8 = undefined;
        const name_length = length - name_start;
        if (name_length >= name.len) return null;
        @memcpy(name[0..name_length], wanted[name_start..length]);
        name[name_length] = 0;
        if (name_start == 0) {
            wanted[0] = '.';
            wanted[1] = 0;
        } else wanted[@max(1, slash.?)] = 0; // "/name": the parent is "/"
        const parent = linux.open(&wanted, .{ .PATH = true, .DIRECTORY = true, .CLOEXEC = true }, 0);
        if (system.failure(parent) != null) return null;
        const directory: i32 = @intCast(parent);
        defer system.close(directory);
        const resolved = ofDescriptor(directory, buffer) orelse return null;

        var target: Buffer = undefined;
        const target_length = linux.readlinkat(directory, &name, &target, target.len);
        const dangling = system.failure(target_length) == null;
        const last: []const u8 = if (dangling) target[0..target_length] else name[0..name_length];
        if (dangling and last.len > 0 and last[0] == '/') {
            if (last.len >= bytes_max) return null;
            @memcpy(wanted[0..last.len], last);
            wanted[last.len] = 0;
            length = last.len;
            continue;
        }
        const root = resolved.len == 1;
        const joined = (if (root) 0 else resolved.len) + 1 + last.len;
        if (joined >= bytes_max) return null;
        const start = if (root) 0 else resolved.len;
        buffer[start] = '/';
        @memcpy(buffer[start + 1 ..][0..last.len], last);
        if (!dangling) return buffer[0..joined];
        @memcpy(wanted[0..joined], buffer[0..joined]);
        wanted[joined] = 0;
        length = joined;
    }
    return null;
}

test "a path is resolved as an open with O_CREAT would" {
    const testing = std.testing;
    const temporary = @import("../testing/directory.zig").Directory.make();
    defer temporary.remove();
    const root = temporary.text();
    var directory = try std.fs.openDirAbsolute(root, .{});
    defer directory.close();
    try directory.makeDir("real");
    try directory.writeFile(.{ .sub_path = "real/present", .data = "" });
    try directory.symLink("real", "linked", .{});
    try directory.symLink("real/absent", "dangling", .{});
    try directory.symLink("loop", "loop", .{});

    const cases = [_]struct { []const u8, ?[]const u8 }{
        .{ "real/present", "real/present" },
        .{ "linked/present", "real/present" },
        .{ "linked/new", "real/new" },
        .{ "linked/../real/./new", "real/new" },
        .{ "dangling", "real/absent" },
        .{ "missing/new", null },
        .{ "loop", null },
        .{ "new/", null },
    };
    for (cases) |case| {
        var path_buffer: [std.fs.max_path_bytes]u8 = undefined;
        const path = try std.fmt.bufPrintZ(&path_buffer, "{s}/{s}", .{ root, case[0] });
        var buffer: Buffer = undefined;
        const found = resolve(path, &buffer);
        if (case[1]) |expected| {
            var expected_buffer: [std.fs.max_path_bytes]u8 = undefined;
            try testing.expectEqualStrings(try std.fmt.bufPrint(&expected_buffer, "{s}/{s}", .{ root, expected }), found.?);
        } else try testing.expectEqual(null, found);
    }
    var buffer: Buffer = undefined;
    try testing.expectEqualStrings("/name-in-the-root-directory", resolve("/name-in-the-root-directory", &buffer).?);
}
