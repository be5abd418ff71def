//! Finding the daemon, losing it, finding it again; forks; answers that make no sense.

const std = @import("std");
const linux = std.os.linux;
const testing = std.testing;
const library = @import("../elgate_client.zig");
const ring = @import("../format/ring.zig");
const fake = @import("../testing/fake_daemon.zig");
const harness = @import("harness.zig");
const producer = @import("producer.zig");
const session = &@import("session.zig").process;
const thread_module = @import("thread.zig");
const Fixture = harness.Fixture;
const Directory = @import("../testing/directory.zig").Directory;

const everything = [_]fake.RouteSpec{.{ .name = "all", .pattern = "/**" }};

extern "c" fn fork() c_int;

test "without a daemon: passthrough, fail, wait, disabled" {
    const directory = Directory.make();
    defer directory.remove();
    var buffer: [128]u8 = undefined;
    const socket = try std.fmt.bufPrintZ(&buffer, "{s}/none.sock", .{directory.text()});
    try testing.expectEqual(0, harness.startClient(socket, null, null));
    try testing.expectEqual(1, harness.status().disabled);
    try testing.expectEqual(0, library.elgate_start("test"));
    try testing.expectEqual(0, library.elgate_path_is_routed("/tmp/x"));
    try testing.expectEqual(0, library.elgate_stop());

    try testing.expectEqual(-@as(c_int, @intFromEnum(linux.E.NOENT)), harness.startClient(socket, "fail", null));
    try testing.expectEqual(-@as(c_int, @intFromEnum(linux.E.NOENT)), harness.startClient(socket, "wait", "30"));
    try testing.expectEqual(0, library.elgate_stop());

    for ([_][:0]const u8{ "1", "true", "YES", "what?" }) |yes| {
        harness.environment("ELGATE_DISABLE", yes);
        try testing.expectEqual(0, library.elgate_start("test"));
        try testing.expectEqual(1, harness.status().disabled);
        try testing.expectEqual(0, library.elgate_stop());
    }
    for ([_][:0]const u8{ "", "0", "False", "no" }) |no| {
        harness.environment("ELGATE_DISABLE", no);
        try testing.expectEqual(-@as(c_int, @intFromEnum(linux.E.NOENT)), library.elgate_start("test"));
        try testing.expectEqual(0, library.elgate_stop());
    }
    harness.environment("ELGATE_DISABLE", null);
}

test "a marked file is never written past an absent daemon" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("marked", true);
    try testing.expectEqual(4, harness.write(fd, "mark"));
    try testing.expectEqual(0, harness.close(fd));
    try testing.expectEqual(0, library.elgate_stop());
    fixture.daemon.die();

    try testing.expectEqual(0, harness.startClient(fixture.daemon.socketText(), "passthrough", "40"));
    const marked = try fixture.open("marked", .{ .ACCMODE = .WRONLY });
    try testing.expectEqual(-@as(c_int, @intFromEnum(linux.E.IO)), marked.routed);
    _ = linux.close(marked.fd);
    const fresh = try fixture.open("fresh", .{ .ACCMODE = .WRONLY, .CREAT = true });
    try testing.expectEqual(0, fresh.routed);
    _ = linux.close(fresh.fd);

    // It comes back: the same open is served.
    fixture.daemon.serve();
    const again = try fixture.open("marked", .{ .ACCMODE = .WRONLY, .APPEND = true });
    try testing.expectEqual(1, again.routed);
    try testing.expectEqual(3, harness.write(again.fd, "ing"));
    try testing.expectEqual(0, harness.close(again.fd));
    try fixture.expectContents("marked", "marking");
}

test "an answer that makes no sense is refused, and leaves nothing open" {
    const daemon = fake.FakeDaemon.start(&everything);
    defer daemon.destroy();
    inline for (@typeInfo(fake.Fault).@"enum".fields) |field| {
        const fault: fake.Fault = @enumFromInt(field.value);
        if (fault == .none) continue;
        @atomicStore(fake.Fault, &daemon.fault, fault, .seq_cst);
        const before = own();
        testing.expectEqual(0, harness.startClient(daemon.socketText(), null, null)) catch |err| {
            std.debug.print("fault {s}\n", .{field.name});
            return err;
        };
        try testing.expectEqual(-1, session.control_fd);
        try testing.expectEqual(before, own());
        try testing.expectEqual(0, library.elgate_stop());
    }
    @atomicStore(fake.Fault, &daemon.fault, .none, .seq_cst);
    try testing.expectEqual(1, harness.startClient(daemon.socketText(), null, null));
    try testing.expect(session.control_fd >= 512);
    try testing.expectEqual(0, library.elgate_stop());
}

/// Descriptors that are ring, positions or routes of the daemon, wherever they came from.
fn own() usize {
    var count: usize = 0;
    for (0..2048) |number| {
        var buffer: @import("path.zig").Buffer = undefined;
        const link = std.fmt.bufPrintZ(buffer[0..64], "/proc/self/fd/{d}", .{number}) catch unreachable;
        var target: [256]u8 = undefined;
        const length = linux.readlink(link, &target, target.len);
        if (@as(isize, @bitCast(length)) <= 0) continue;
        if (std.mem.startsWith(u8, target[0..length], "/memfd:elgate-test-ring")) count += 1;
        if (std.mem.startsWith(u8, target[0..length], "/memfd:elgate-test-positions")) count += 1;
    }
    return count;
}

test "a daemon that returns finds what was accepted meanwhile, each record once and in order" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const Writer = struct {
        fixture: Fixture,
        fd: i32,
        number: u32 = 0,
        until: u32 = 0,
        failure: i64 = 0,

        fn run(writer: *@This()) void {
            while (writer.number < @atomicLoad(u32, &writer.until, .seq_cst)) {
                var line: [16]u8 = undefined;
                const text = std.fmt.bufPrint(&line, "{d:0>8}\n", .{writer.number}) catch unreachable;
                const result = harness.write(writer.fd, text);
                if (result != text.len) {
                    writer.failure = result;
                    return;
                }
                if (writer.number % 64 == 63) {
                    const synced = library.elgate_fsync(writer.fd);
                    if (synced != 0) {
                        writer.failure = synced;
                        return;
                    }
                }
                _ = @atomicRmw(u32, &writer.number, .Add, 1, .seq_cst);
            }
            library.elgate_thread_detach();
        }
    };
    var writers: [2]Writer = undefined;
    var threads: [2]std.Thread = undefined;
    for (&writers, &threads, 0..) |*writer, *thread, index| {
        writer.* = .{ .fixture = fixture, .fd = try fixture.create(if (index == 0) "first" else "second", true), .until = 1_000_000 };
        thread.* = try std.Thread.spawn(.{}, Writer.run, .{writer});
    }
    const Progress = struct { writers: *[2]Writer, from: [2]u32 };
    for (0..6) |round| {
        try harness.eventually(Progress{ .writers = &writers, .from = .{ writers[0].number + 200, writers[1].number + 200 } }, struct {
            fn made(progress: Progress) bool {
                for (progress.writers, progress.from) |*writer, from| {
                    if (writer.failure != 0) return true;
                    if (@atomicLoad(u32, &writer.number, .seq_cst) < from) return false;
                }
                return true;
            }
        }.made);
        fixture.daemon.die();
        // Another daemon counts its routes otherwise.
        fixture.daemon.first_route = @intCast(round + 1);
        fixture.daemon.serve();
    }
    for (&writers) |*writer| @atomicStore(u32, &writer.until, @atomicLoad(u32, &writer.number, .seq_cst) + 100, .seq_cst);
    for (threads) |thread| thread.join();
    for (&writers, 0..) |*writer, index| {
        try testing.expectEqual(0, writer.failure);
        try testing.expectEqual(0, library.elgate_fsync(writer.fd));
        try testing.expectEqual(0, harness.close(writer.fd));
        const bytes = try testing.allocator.alloc(u8, writer.number * 9 + 100);
        defer testing.allocator.free(bytes);
        const found = try fixture.contents(if (index == 0) "first" else "second", bytes);
        try testing.expectEqual(writer.number * 9, found.len);
        for (0..writer.number) |number| {
            try testing.expectEqual(number, try std.fmt.parseInt(u32, found[number * 9 ..][0..8], 10));
        }
    }
    try testing.expectEqual(0, fixture.daemon.count("rejected"));
    try testing.expectEqual(0, fixture.daemon.consumed("damaged"));
    try testing.expect(harness.status().reconnects >= 6);
}

test "a daemon that does not return: the operation fails after the limit, the next at once" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    try testing.expectEqual(0, library.elgate_stop());
    try testing.expectEqual(1, harness.startClient(fixture.daemon.socketText(), null, "60"));
    const fd = try fixture.create("file", true);
    try testing.expectEqual(1, harness.write(fd, "a"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    fixture.daemon.die();
    const io = -@as(c_int, @intFromEnum(linux.E.IO));
    try testing.expectEqual(io, library.elgate_fsync(fd));
    try testing.expectEqual(io, library.elgate_fsync(fd));
    try testing.expectEqual(@as(i64, io), harness.write(fd, "b"));
    // Somebody else has it open too, who may have written since: it is not for us to say what is in it.
    try testing.expectEqual(io, library.elgate_drain(fd));
    // What this process wrote is known to be applied: its end, and a close, need no daemon.
    try testing.expectEqual(0, library.elgate_drain_all());
    try testing.expectEqual(0, harness.status().connected);
    fixture.daemon.serve();
    try testing.expectEqual(1, harness.write(fd, "c"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    fixture.daemon.die();
    try testing.expectEqual(0, harness.close(fd));
    try fixture.expectContents("file", "ac");
}

test "a ring that is gone with undurable operations: EIO, once" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    const other = try fixture.create("other", true);
    try testing.expectEqual(1, harness.write(other, "x"));
    try testing.expectEqual(0, library.elgate_fsync(other));
    fixture.daemon.pause(true);
    try testing.expectEqual(4, harness.write(fd, "lost"));
    fixture.daemon.die();
    fixture.daemon.loseRing();
    fixture.daemon.pause(false);
    fixture.daemon.serve();
    const io = -@as(c_int, @intFromEnum(linux.E.IO));
    try testing.expectEqual(io, library.elgate_fsync(fd));
    try testing.expectEqual(5, harness.write(fd, "found"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    // What was durable is nobody's loss.
    try testing.expectEqual(0, library.elgate_fsync(other));
    try testing.expectEqual(0, harness.close(other));
    try testing.expectEqual(0, harness.close(fd));
    try fixture.expectContents("file", "found");
}

test "a session that the daemon ends is opened again, and nothing sent in it is lost" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    for (0..50) |round| {
        try testing.expectEqual(1, harness.write(fd, &.{@intCast('a' + round % 26)}));
        if (round % 10 != 9) continue;
        // The daemon hangs up on us; its rows are taken back before it looks how far we came.
        fixture.daemon.mutex.lock();
        const last = fixture.daemon.session_fds.getLast();
        fixture.daemon.mutex.unlock();
        _ = linux.shutdown(last, linux.SHUT.RDWR);
    }
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try testing.expectEqual(0, harness.close(fd));
    var buffer: [100]u8 = undefined;
    const found = try fixture.contents("file", &buffer);
    try testing.expectEqual(50, found.len);
    for (found, 0..) |byte, round| try testing.expectEqual('a' + round % 26, byte);
    try testing.expectEqual(0, fixture.daemon.count("rejected"));
}

test "a program that closes the control socket loses nothing" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(1, harness.write(fd, "a"));
    // Through a hook: the connection moves away.
    const control = session.control_fd;
    try testing.expectEqual(0, library.elgate_close(control));
    _ = linux.close(control);
    try testing.expectEqual(0, library.elgate_fsync(fd));
    // Behind our back, and the number is somebody else's now.
    const reconnects = harness.status().reconnects;
    _ = fake.check(linux.dup3(fd, session.control_fd, 0));
    const stranger = session.control_fd;
    try testing.expectEqual(1, harness.write(fd, "b"));
    const second = try fixture.create("second", false);
    try testing.expectEqual(1, harness.write(second, "c"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try testing.expect(harness.status().reconnects > reconnects);
    _ = fake.check(linux.fcntl(stranger, 1, 0)); // still the stranger's
    _ = linux.close(stranger);
    try testing.expectEqual(0, harness.close(second));
    try testing.expectEqual(0, harness.close(fd));
    try fixture.expectContents("file", "ab");
}

fn waitForChild(child: c_int) !void {
    var status: c_int = 0;
    try testing.expectEqual(child, std.c.waitpid(child, &status, 0));
    try testing.expectEqual(0, status);
}

test "a forked child attaches anew, beside its parent" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("shared", true);
    try testing.expectEqual(7, harness.write(fd, "parent\n"));
    try testing.expectEqual(0, library.elgate_before_fork());
    const registrations = fixture.daemon.count("registrations");
    const child = fork();
    if (child == 0) {
        library.elgate_after_fork_in_child();
        var wrong: u8 = 0;
        if (harness.status().connected != 0) wrong |= 1;
        if (harness.write(fd, "child\n") != 6) wrong |= 2;
        if (library.elgate_fsync(fd) != 0) wrong |= 4;
        if (harness.status().connected != 1) wrong |= 8;
        if (library.elgate_close(fd) != 0) wrong |= 16;
        linux.exit_group(wrong);
    }
    try waitForChild(child);
    try testing.expectEqual(registrations + 1, fixture.daemon.count("registrations"));
    try testing.expectEqual(7, harness.write(fd, "parent\n"));
    try testing.expectEqual(0, harness.close(fd));
    try fixture.expectContents("shared", "parent\nchild\nparent\n");
    try testing.expectEqual(0, fixture.daemon.count("rejected"));
}

test "a child that is killed in the middle of a claim holds nobody up" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(1, harness.write(fd, "a"));
    const child = fork();
    if (child == 0) {
        library.elgate_after_fork_in_child();
        const own_fd = fd;
        if (harness.write(own_fd, "b") != 1) linux.exit_group(1);
        const thread = thread_module.current(session.fork_epoch);
        var opening: u64 = 0;
        var allowed: u64 = 0;
        _ = producer.claim(thread.ring.?.view, thread.row, 3, null, &opening, &allowed) catch linux.exit_group(2);
        _ = linux.kill(linux.getpid(), linux.SIG.KILL);
    }
    var status: c_int = 0;
    try testing.expectEqual(child, std.c.waitpid(child, &status, 0));
    try testing.expectEqual(linux.SIG.KILL, status & 0x7f);
    try testing.expectEqual(1, harness.write(fd, "c"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try testing.expectEqual(0, harness.close(fd));
    try testing.expectEqual(1, fixture.daemon.consumed("aborted"));
    try fixture.expectContents("file", "abc");
}

test "threads that end hand their rows on" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    const attachments = fixture.daemon.count("attachments");
    for (0..10) |_| {
        const thread = try std.Thread.spawn(.{}, struct {
            fn run(to: i32) void {
                _ = harness.write(to, "x");
            }
        }.run, .{fd});
        thread.join();
    }
    try testing.expectEqual(attachments + 1, fixture.daemon.count("attachments"));
    try testing.expectEqual(0, harness.close(fd));
    try fixture.expectContents("file", "xxxxxxxxxx");
}

/// An operation that a signal handler jumped out of, as it lies on the thread's stack of operations.
noinline fn abandonClaim(deeper: u32) void {
    var place: [256]u8 = undefined;
    std.mem.doNotOptimizeAway(&place);
    if (deeper > 0) return abandonClaim(deeper - 1);
    const thread = thread_module.current(session.fork_epoch);
    const operation = thread.push(@intFromPtr(&place)).?;
    var allowed: u64 = 0;
    _ = producer.claim(thread.ring.?.view, thread.row, 2, null, &operation.opening, &allowed) catch unreachable;
}

test "a claim that a signal handler jumped out of is given up by the thread's next operation" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(1, harness.write(fd, "a"));
    const thread = thread_module.current(session.fork_epoch);
    const view = thread.ring.?.view;
    const head = view.header().head;
    abandonClaim(10);
    abandonClaim(20);
    try testing.expectEqual(2, thread.depth);
    try testing.expectEqual(1, harness.write(fd, "b"));
    try testing.expectEqual(0, thread.depth);
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try harness.eventually(view, struct {
        fn released(ring_view: ring.View) bool {
            return @atomicLoad(u64, &ring_view.header().tail, .acquire) == @atomicLoad(u64, &ring_view.header().head, .acquire);
        }
    }.released);
    try testing.expect(view.header().head >= head + 5);
    try testing.expectEqual(0, fixture.daemon.consumed("aborted")); // by the thread, not by the daemon
    try testing.expectEqual(0, harness.close(fd));
    try fixture.expectContents("file", "ab");
}

var handler_fd: i32 = -1;
var handler_writes: u32 = 0;

fn writeInHandler(_: i32) callconv(.c) void {
    if (harness.write(handler_fd, "handler\n") == 8) _ = @atomicRmw(u32, &handler_writes, .Add, 1, .seq_cst);
}

test "a signal handler may write while its thread is writing" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    handler_fd = try fixture.create("handler", true);
    handler_writes = 0;
    const fd = try fixture.create("main", true);
    try testing.expectEqual(1, harness.write(fd, "\n"));
    const action = std.posix.Sigaction{ .handler = .{ .handler = writeInHandler }, .mask = std.posix.sigemptyset(), .flags = std.posix.SA.RESTART };
    var before: std.posix.Sigaction = undefined;
    std.posix.sigaction(std.posix.SIG.USR1, &action, &before);
    defer std.posix.sigaction(std.posix.SIG.USR1, &before, null);

    const Sender = struct {
        target: i32,
        stop: bool = false,
        fn run(sender: *@This()) void {
            // One at a time, and not without end: a thread that is interrupted again before its handler has
            // returned gets nowhere on a busy machine.
            for (0..2000) |_| {
                const handled = @atomicLoad(@TypeOf(handler_writes), &handler_writes, .seq_cst);
                _ = linux.tgkill(linux.getpid(), sender.target, linux.SIG.USR1);
                while (@atomicLoad(@TypeOf(handler_writes), &handler_writes, .seq_cst) == handled) {
                    if (@atomicLoad(bool, &sender.stop, .seq_cst)) return;
                    std.Thread.yield() catch {};
                }
            }
        }
    };
    var sender = Sender{ .target = linux.gettid() };
    const thread = try std.Thread.spawn(.{}, Sender.run, .{&sender});
    // Long enough to be interrupted in the middle of the copy.
    const long = try testing.allocator.alloc(u8, 300_000);
    defer testing.allocator.free(long);
    @memset(long, 'x');
    long[long.len - 1] = '\n';
    var written: u64 = 1;
    for (0..200) |_| {
        const result = harness.write(fd, long);
        try testing.expectEqual(@as(i64, @intCast(long.len)), result);
        written += long.len;
    }
    @atomicStore(bool, &sender.stop, true, .seq_cst);
    thread.join();
    try testing.expectEqual(0, library.elgate_drain_all());
    try testing.expect(handler_writes > 0);
    const sizes = [_]struct { i32, u64 }{ .{ fd, written }, .{ handler_fd, @as(u64, handler_writes) * 8 } };
    for (sizes) |expected| {
        var found: linux.Stat = undefined;
        _ = fake.check(linux.fstat(expected[0], &found));
        try testing.expectEqual(expected[1], @as(u64, @bitCast(found.size)));
        try testing.expectEqual(0, harness.close(expected[0]));
    }
    try testing.expectEqual(0, fixture.daemon.consumed("damaged"));
}
