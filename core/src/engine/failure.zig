//! Why something could not be done, in words for the person who reads them at night: what, where, why likely,
//! what to do; with the errno for the caller.

const std = @import("std");
const linux = std.os.linux;

pub const Failure = struct {
    errno: i32 = 0,
    text: [1024]u8 = undefined,
    length: usize = 0,

    /// Keeps the first failure; returns error.Failed for `return failure.set(…)`.
    pub fn set(failure: *Failure, errno: i32, comptime format: []const u8, arguments: anytype) error{Failed} {
        if (failure.errno == 0) {
            failure.errno = errno;
            var writer = std.Io.Writer.fixed(&failure.text);
            // A text that does not fit is cut, never lost.
            writer.print(format, arguments) catch {};
            failure.length = writer.end;
        }
        return error.Failed;
    }

    pub fn message(failure: *const Failure) []const u8 {
        return failure.text[0..failure.length];
    }

    /// "ENOSPC" for 28; "errno" where it has no name.
    pub fn nameOf(errno: i32) []const u8 {
        const code: linux.E = @enumFromInt(@as(u16, @intCast(errno)));
        return std.enums.tagName(linux.E, code) orelse "unknown errno";
    }
};
