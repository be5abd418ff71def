//! A directory of a test's own. Short, so that a socket's path fits; on $TMPDIR, else /tmp.

const std = @import("std");

pub const Directory = struct {
    path: [80:0]u8,

    pub fn make() Directory {
        var directory: Directory = .{ .path = @splat(0) };
        const parent = if (std.posix.getenv("TMPDIR")) |value| (if (value.len <= 40) value else "/tmp") else "/tmp";
        _ = std.fmt.bufPrintZ(&directory.path, "{s}/elgate-test-{x}", .{ parent, std.crypto.random.int(u64) }) catch unreachable;
        std.fs.makeDirAbsolute(directory.text()) catch |err| std.debug.panic("cannot make {s}: {s}", .{ directory.text(), @errorName(err) });
        return directory;
    }

    pub fn text(directory: *const Directory) [:0]const u8 {
        return std.mem.sliceTo(&directory.path, 0);
    }

    pub fn remove(directory: *const Directory) void {
        std.fs.deleteTreeAbsolute(directory.text()) catch {};
    }
};
