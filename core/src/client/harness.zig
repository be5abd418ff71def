//! What tests of the client share: starting it against a daemon of their own, and files to write.

const std = @import("std");
const linux = std.os.linux;
const library = @import("../elgate_client.zig");
const fake = @import("../testing/fake_daemon.zig");
const session = &@import("session.zig").process;

pub const native = @import("files.zig").native;

extern "c" fn setenv(name: [*:0]const u8, value: [*:0]const u8, overwrite: c_int) c_int;
extern "c" fn unsetenv(name: [*:0]const u8) c_int;

pub fn environment(name: [*:0]const u8, value: ?[*:0]const u8) void {
    _ = if (value) |text| setenv(name, text, 1) else unsetenv(name);
}

/// Starts the client as a program would, with the environment that a test wants.
pub fn startClient(socket: [*:0]const u8, fallback: ?[*:0]const u8, limit_ms: ?[*:0]const u8) c_int {
    environment("ELGATE_DISABLE", null);
    environment("ELGATE_SOCKET", socket);
    environment("ELGATE_FALLBACK", fallback);
    environment("ELGATE_RECONNECT_TIMEOUT_MS", limit_ms);
    session.warned_protocol = false;
    if (session.currentState() != .idle) session.stop(); // left over by a test that failed
    return library.elgate_start("test");
}

/// A daemon and a client that is connected to it.
pub const Fixture = struct {
    daemon: *fake.FakeDaemon,

    pub fn init(specs: []const fake.RouteSpec) !Fixture {
        const daemon = fake.FakeDaemon.start(specs);
        if (startClient(daemon.socketText(), null, "20000") != 1) return error.NotConnected;
        return .{ .daemon = daemon };
    }

    pub fn deinit(fixture: Fixture) void {
        fixture.daemon.pause(false);
        _ = library.elgate_stop();
        fixture.daemon.destroy();
    }

    pub fn path(fixture: Fixture, name: []const u8) [128:0]u8 {
        var buffer: [128:0]u8 = @splat(0);
        _ = std.fmt.bufPrintZ(&buffer, "{s}/{s}", .{ fixture.daemon.directoryText(), name }) catch unreachable;
        return buffer;
    }

    /// open(2), then as a hook would.
    pub fn open(fixture: Fixture, name: []const u8, flags: linux.O) !Opened {
        const text = fixture.path(name);
        const fd: i32 = @intCast(fake.check(linux.open(&text, flags, 0o600)));
        const result = library.elgate_opened(fd, &text, @bitCast(flags));
        return .{ .fd = fd, .routed = result };
    }

    /// A new file, open for writing, that Elgate has taken.
    pub fn create(fixture: Fixture, name: []const u8, append: bool) !i32 {
        const opened = try fixture.open(name, .{ .ACCMODE = .RDWR, .CREAT = true, .APPEND = append });
        try std.testing.expectEqual(1, opened.routed);
        return opened.fd;
    }

    pub fn contents(fixture: Fixture, name: []const u8, buffer: []u8) ![]u8 {
        const text = fixture.path(name);
        const fd: i32 = @intCast(fake.check(linux.open(&text, .{}, 0)));
        defer _ = linux.close(fd);
        var length: usize = 0;
        while (length < buffer.len) {
            const got = fake.check(linux.read(fd, buffer[length..].ptr, buffer.len - length));
            if (got == 0) break;
            length += got;
        }
        return buffer[0..length];
    }

    pub fn expectContents(fixture: Fixture, name: []const u8, expected: []const u8) !void {
        var buffer: [4096]u8 = undefined;
        try std.testing.expectEqualStrings(expected, try fixture.contents(name, &buffer));
    }
};

pub const Opened = struct { fd: i32, routed: c_int };

pub fn write(fd: i32, text: []const u8) i64 {
    return library.elgate_write(fd, text.ptr, text.len);
}

pub fn close(fd: i32) c_int {
    const result = library.elgate_close(fd);
    _ = linux.close(fd);
    return result;
}

pub fn offsetOf(fd: i32) u64 {
    return fake.check(linux.lseek(fd, 0, linux.SEEK.CUR));
}

pub fn status() library.Status {
    var current: library.Status = undefined;
    library.elgate_get_status(&current);
    return current;
}

/// Until `condition` holds; fails after ten seconds.
pub fn eventually(context: anytype, comptime condition: fn (@TypeOf(context)) bool) !void {
    const deadline = std.time.nanoTimestamp() + 10 * std.time.ns_per_s;
    while (!condition(context)) {
        if (std.time.nanoTimestamp() > deadline) return error.TookTooLong;
        std.Thread.yield() catch {};
    }
}

pub fn openDescriptors() !usize {
    var directory = try std.fs.openDirAbsolute("/proc/self/fd", .{ .iterate = true });
    defer directory.close();
    var iterator = directory.iterate();
    var count: usize = 0;
    while (try iterator.next()) |_| count += 1;
    return count;
}
