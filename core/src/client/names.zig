//! Before the name of a file is changed: the daemon is told, and answers once its log has it, so that the file is found
//! again whatever happens next. It concerns files that carry the mark, whoever has them open, and directories that may
//! have such files below them.

const std = @import("std");
const linux = std.os.linux;
const control = @import("../format/control.zig");
const wal = @import("../format/wal.zig");
const files = @import("files.zig");
const path_module = @import("path.zig");
const session_module = @import("session.zig");
const system = @import("system.zig");
const wait = @import("wait.zig");
const session = &session_module.process;

const restarts_max = 64;

/// 0: there is nothing to say; 1: it is said; -errno: it could not be logged, and must not be done.
pub fn beforeRename(old: [*:0]const u8, new: [*:0]const u8) i32 {
    if (!isServed() or !exists(old)) return 0; // the native call says what is wrong
    const moves = isMarkedAt(old) or mayHoldRouted(old);
    const replaces = isMarkedAt(new) and !isSame(old, new);
    const removed = if (replaces) sayRemoved(new) else 0;
    if (removed < 0) return removed;
    const moved = if (moves) say(.moved, old, new) else 0;
    if (moved < 0) {
        if (replaces) {
            const before = wait.ignoreSignals();
            defer wait.resumeSignals(before);
            _ = say(.moved, new, new); // it stays where it is
        }
        return moved;
    }
    return @intFromBool(removed == 1 or moved == 1);
}

/// As `beforeRename`.
pub fn beforeUnlink(path: [*:0]const u8) i32 {
    return if (isServed() and isMarkedAt(path)) sayRemoved(path) else 0;
}

fn sayRemoved(path: [*:0]const u8) i32 {
    var status: linux.Stat = undefined;
    if (system.failure(linux.fstatat(linux.AT.FDCWD, path, &status, linux.AT.SYMLINK_NOFOLLOW)) != null) return 0;
    const left = files.losesName(status.dev, status.ino);
    return if (left != 0) left else say(.removed, path, null);
}

/// Where nobody is there to be told, a name is changed as other programs do it.
fn isServed() bool {
    session.checkFork();
    if (session.inBorrowedMemory()) return false;
    return switch (session.currentState()) {
        .connected, .lost => true,
        .idle, .disabled, .passthrough => false,
    };
}

/// One system call, which is all that a file costs that has nothing to do with Elgate.
fn isMarkedAt(path: [*:0]const u8) bool {
    var attribute: wal.FileAttribute = undefined;
    const length = linux.lgetxattr(path, wal.attribute_name, std.mem.asBytes(&attribute), @sizeOf(wal.FileAttribute));
    if (system.failure(length)) |errno| return errno == .RANGE; // larger than ours: of a later version
    return length > 0;
}

/// A directory that a route's files may lie below.
fn mayHoldRouted(path: [*:0]const u8) bool {
    const opened = linux.open(path, .{ .PATH = true, .DIRECTORY = true, .NOFOLLOW = true, .CLOEXEC = true }, 0);
    if (system.failure(opened) != null) return false;
    const fd: i32 = @intCast(opened);
    defer system.close(fd);
    var buffer: path_module.Buffer = undefined;
    return session.mayMatchBelow(path_module.ofDescriptor(fd, &buffer) orelse return false);
}

fn exists(path: [*:0]const u8) bool {
    var status: linux.Stat = undefined;
    return system.failure(linux.fstatat(linux.AT.FDCWD, path, &status, linux.AT.SYMLINK_NOFOLLOW)) == null;
}

/// Two names of one file: a rename leaves both.
fn isSame(old: [*:0]const u8, new: [*:0]const u8) bool {
    var status: [2]linux.Stat = undefined;
    for ([_][*:0]const u8{ old, new }, &status) |path, *into| {
        if (system.failure(linux.fstatat(linux.AT.FDCWD, path, into, linux.AT.SYMLINK_NOFOLLOW)) != null) return false;
    }
    return status[0].dev == status[1].dev and status[0].ino == status[1].ino;
}

/// 1, 0 where there is nobody to be told after all (or nothing to be changed), or -errno.
fn say(change: control.NameChange, path: [*:0]const u8, new: ?[*:0]const u8) i32 {
    // O_PATH opens nothing of the file itself, and its close drops no POSIX lock of the application.
    const opened = linux.open(path, .{ .PATH = true, .NOFOLLOW = true, .CLOEXEC = true }, 0);
    if (system.failure(opened) != null) return 0; // the native call says what is wrong
    const file: i32 = @intCast(opened);
    defer system.close(file);
    var passed = [2]i32{ file, -1 };
    var name: []const u8 = "";
    if (new) |target| {
        const whole = std.mem.trimRight(u8, std.mem.span(target), "/");
        name = std.fs.path.basenamePosix(whole);
        if (name.len == 0 or name.len > control.name_bytes_max) return 0;
        passed[1] = openParent(whole[0 .. whole.len - name.len]) orelse return 0;
    }
    defer if (new != null) system.close(passed[1]);
    const deadline_ns = system.monotonicNs() +| session.reconnect_limit_ns;
    var backoff = session_module.Backoff{};
    for (0..restarts_max) |_| {
        session.ensureConnected() catch |err| {
            if (session.currentState() == .passthrough) return 0;
            return files.errnoOf(err);
        };
        var refusal: session_module.Refusal = undefined;
        session.changeName(change, passed[0..if (new == null) 1 else 2], name, &refusal) catch |err| switch (err) {
            error.Lost => if (system.monotonicNs() >= deadline_ns) return system.negative(.IO) else continue,
            error.Refused => {
                // Short of descriptors, which files that are closed give back soon; or the file is just being registered.
                if (refusal.reason == .limit_reached and system.monotonicNs() < deadline_ns) {
                    if (wait.isEnded(backoff.sleep(deadline_ns))) return system.negative(.INTR);
                    continue;
                }
                return if (refusal.errno > 0 and refusal.errno < 4096) -refusal.errno else system.negative(.IO);
            },
            error.HeldByThisThread, error.Interrupted => return files.errnoOf(err),
        };
        return 1;
    }
    return system.negative(.IO);
}

fn openParent(parent: []const u8) ?i32 {
    var buffer: [path_module.bytes_max:0]u8 = undefined;
    const text = if (parent.len == 0) "." else parent;
    if (text.len >= buffer.len) return null;
    @memcpy(buffer[0..text.len], text);
    buffer[text.len] = 0;
    const opened = linux.open(&buffer, .{ .PATH = true, .DIRECTORY = true, .CLOEXEC = true }, 0);
    return if (system.failure(opened) == null) @intCast(opened) else null;
}
