//! Names that change, and what the log must know of that, so that a replay finds its files.
//!
//! A file is found by its path first, and often by nothing else: only root may open by a kernel handle, and only the
//! directories that the log names are looked through. So a client says what it is about to do to a name; that is in the
//! log, durably, before the kernel hears of it. Whether it then happened nobody says: a replay tries all paths, and a
//! file that was said to lose its name is missed only where a later record says that it has one. What other programs do
//! is seen with the next checkpoint, which asks the kernel where each file is.
//!
//! Worker thread.

const std = @import("std");
const assert = std.debug.assert;
const os = @import("os.zig");
const File = @import("files.zig").File;
const Route = @import("route.zig").Route;
const Request = @import("requests.zig").Request;
const Worker = @import("worker.zig").Worker;

/// What a request says; see control.ChangeName.
pub const Change = struct {
    /// The new one.
    path_buffer: [4096]u8 = undefined,
    path_length: usize = 0,
    /// Of the directory that moves, before.
    below_buffer: [4096]u8 = undefined,
    below_length: usize = 0,

    pub fn path(change: *const Change) []const u8 {
        return change.path_buffer[0..change.path_length];
    }

    /// Where a file that is at `now` will be; null: not below the directory, or too deep to be named.
    pub fn carried(change: *const Change, now: []const u8, buffer: *[4096]u8) ?[]const u8 {
        const below = change.below_buffer[0..change.below_length];
        if (!std.mem.startsWith(u8, now, below) or now.len == below.len or now[below.len] != '/') return null;
        const rest = now[below.len..];
        if (change.path_length + rest.len >= buffer.len) return null;
        @memcpy(buffer[0..change.path_length], change.path());
        @memcpy(buffer[change.path_length..][0..rest.len], rest);
        return buffer[0 .. change.path_length + rest.len];
    }
};

/// What has been said of a file's name.
pub const Naming = struct {
    /// Where it may be as well; empty: nowhere, or it has been seen there. Owned.
    path: []const u8 = &.{},
    lsn: u64 = 0,
    /// Where it was, until a sync of its directory has made its present name durable. Owned.
    former: []const u8 = &.{},
    /// It is losing its last name.
    removed: bool = false,

    fn forgetPath(naming: *Naming, allocator: std.mem.Allocator) void {
        allocator.free(naming.path);
        naming.path = &.{};
    }

    pub fn forgetFormer(naming: *Naming, allocator: std.mem.Allocator) void {
        allocator.free(naming.former);
        naming.former = &.{};
    }

    pub fn deinit(naming: *Naming, allocator: std.mem.Allocator) void {
        naming.forgetPath(allocator);
        naming.forgetFormer(allocator);
    }
};

pub fn serve(worker: *Worker, request: *Request) Worker.Served {
    const route = worker.state.route(request.routeIndex());
    if (request.kind == .moved_below) return serveBelow(worker, request, route);
    const file = request.file.?;
    if (!worker.hasRoom()) return .later;
    switch (request.kind) {
        .removed => {
            if (!leaves(worker, request)) return .later;
            if (worker.logOwn(file, route, .removed, &.{}, null) == null) return .later;
            file.naming.removed = true;
        },
        .moved => {
            // Whoever opens it by that name writes it natively.
            if (request.leaves_route and !leaves(worker, request)) return .later;
            logPath(worker, file, route, request.change.?.path()) catch |err| {
                if (err == error.OutOfMemory and request.begun) Worker.abandonFence(file, request);
                return notLogged(request, err);
            };
        },
        else => unreachable,
    }
    return .after_commit;
}

/// Who has a file open that loses its last name has it for itself: no replay would find it, and a daemon that comes after
/// this one could not take it back. So it is fenced, and native for all that have it open. false: not yet.
fn leaves(worker: *Worker, request: *Request) bool {
    const file = request.file.?;
    if (request.unfenced) return true;
    if (!request.begun and (file.handle_list.items.len == 0 or file.native == .native)) return true;
    switch (worker.serveFence(request)) {
        .later => return false,
        .after_commit => return true,
        // A file that cannot be synced, on a full disk for one, can be removed all the same.
        .answered => {
            request.errno = 0;
            request.begun = false;
            request.unfenced = true;
            return true;
        },
    }
}

fn serveBelow(worker: *Worker, request: *Request, route: *Route) Worker.Served {
    const change = request.change.?;
    const since_lsn = request.lsn orelse route.log.nextLsn();
    request.lsn = since_lsn;
    var last_lsn: u64 = 0;
    for (worker.known_files.items) |file| {
        if (file.route != route.index) continue;
        var now: [4096]u8 = undefined;
        var new: [4096]u8 = undefined;
        const path = change.carried(os.pathOf(file.fd, &now) orelse continue, &new) orelse continue;
        // One group may not have had room for all of them.
        const logged = file.naming.lsn >= since_lsn and std.mem.eql(u8, file.naming.path, path);
        if (!logged) {
            if (!worker.hasRoom()) return .later;
            logPath(worker, file, route, path) catch |err| return notLogged(request, err);
        }
        last_lsn = @max(last_lsn, file.naming.lsn);
    }
    return if (last_lsn <= route.log.durableLsn()) .answered else .after_commit;
}

const LogError = error{ NoRoom, OutOfMemory };

fn logPath(worker: *Worker, file: *File, route: *Route, path: []const u8) LogError!void {
    const kept = try worker.state.allocator.dupe(u8, path);
    errdefer worker.state.allocator.free(kept);
    const lsn = worker.logOwn(file, route, .rename, path, null) orelse return error.NoRoom;
    file.naming.forgetPath(worker.state.allocator);
    file.naming = .{ .path = kept, .lsn = lsn, .former = file.naming.former };
}

fn notLogged(request: *Request, err: LogError) Worker.Served {
    switch (err) {
        error.NoRoom => return .later,
        error.OutOfMemory => {
            request.errno = @intFromEnum(std.os.linux.E.NOMEM);
            return .answered;
        },
    }
}

/// For a checkpoint, below which all that was said goes: who the file is, where it is now, and where else it may be.
/// false: no room for all of it.
pub fn logAnew(worker: *Worker, file: *File, route: *Route) bool {
    const has_name = look(worker, file);
    if (!worker.logIdentity(file, route)) return false;
    for ([_][]const u8{ file.naming.former, file.naming.path }) |path| {
        if (path.len == 0) continue;
        file.naming.lsn = worker.logOwn(file, route, .rename, path, null) orelse return false;
    }
    if (has_name and !file.naming.removed) return true;
    if (worker.logOwn(file, route, .removed, &.{}, null) == null) return false;
    // What was said so long ago and is not so with the next checkpoint either was not done.
    if (has_name) file.naming.removed = false;
    return true;
}

/// Where the kernel has it now. false: it has no name any more.
fn look(worker: *Worker, file: *File) bool {
    const allocator = worker.state.allocator;
    const links = os.linksOf(file.fd) orelse return true;
    if (links == 0) return false;
    if (file.syncing) return true; // its name is looked at, on another thread
    var buffer: [4096]u8 = undefined;
    const path = os.pathOf(file.fd, &buffer) orelse return true;
    const identity = &file.identity;
    if (!std.mem.eql(u8, path, identity.pathText())) {
        if (file.naming.former.len == 0) file.naming.former = allocator.dupe(u8, identity.pathText()) catch return true;
        @memcpy(identity.path[0..path.len], path);
        identity.blob.path_length = @intCast(path.len);
    }
    if (std.mem.eql(u8, path, file.naming.path)) file.naming.forgetPath(allocator);
    return true;
}
