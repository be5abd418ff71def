//! Files under Elgate's care: who they are (identity, attribute), and proof that they can be opened again.
//!
//! A File is made by the control thread when its first handle is registered, or by replay. From then on its
//! `queue` half belongs to the worker, its `handles` half to the control thread.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const positions = @import("../format/positions.zig");
const wal = @import("../format/wal.zig");
const os = @import("os.zig");
const applier = @import("disk/applier.zig");
const Buffer = @import("buffers.zig").Buffer;
const Lane = @import("disk/lanes.zig").FileLanes.Lane;
const Log = @import("wal/log.zig").Log;
const HandleRef = @import("served_ring.zig").HandleRef;
const waiting = @import("waiting.zig");
const names = @import("names.zig");
const Release = @import("release.zig").Release;
const stub = @import("stub.zig");

pub const Identity = struct {
    blob: wal.FileIdentity,
    path: [4096]u8,

    pub fn pathText(identity: *const Identity) []const u8 {
        return identity.path[0..identity.blob.path_length];
    }

    /// Length of the record payload: the blob, then the path.
    pub fn payloadBytes(identity: *const Identity) u32 {
        return @sizeOf(wal.FileIdentity) + identity.blob.path_length;
    }

    pub fn writePayload(identity: *const Identity, payload: []u8) void {
        assert(payload.len == identity.payloadBytes());
        @memcpy(payload[0..@sizeOf(wal.FileIdentity)], std.mem.asBytes(&identity.blob));
        @memcpy(payload[@sizeOf(wal.FileIdentity)..], identity.pathText());
    }

    /// null: the payload is not an identity (damaged, or of a length that cannot be).
    pub fn parse(payload: []const u8) ?Identity {
        var identity: Identity = undefined;
        if (payload.len < @sizeOf(wal.FileIdentity)) return null;
        @memcpy(std.mem.asBytes(&identity.blob), payload[0..@sizeOf(wal.FileIdentity)]);
        const path = payload[@sizeOf(wal.FileIdentity)..];
        if (path.len != identity.blob.path_length or path.len == 0 or path.len >= 4096 or path[0] != '/') return null;
        if (std.mem.indexOfScalar(u8, path, 0) != null) return null;
        @memcpy(identity.path[0..path.len], path);
        return identity;
    }
};

pub const File = struct {
    file_id: u64,
    route: u32,
    /// Of its route.
    log: *Log,
    identity: Identity,
    /// Open for writing while a handle is routed; else for reading, so that a program that has just been written can be
    /// executed (no ETXTBSY). Same number throughout.
    fd: i32,
    /// All syncs go by this description, which is never replaced: one learns of a lost page only if it was open before
    /// anybody else was told. Open for reading where that is permitted, else the same as `fd`.
    sync_fd: i32,

    // Control thread.
    handles: u32 = 0,
    /// Drains, and changes of its name, that the worker has not answered: it must know the file until then.
    questions: u32 = 0,
    /// The session that was about to remove it last: see `Control.keepNames`.
    removal_said_by: u64 = 0,
    open_for_writing: bool = false,

    // Worker thread.
    queue: applier.Queue = .{},
    /// Lasts until the last handle is released.
    native: positions.Native = .routed,
    /// Fences that are not decided yet.
    fences_open: u32 = 0,
    /// A fence is asked for because an append did not land where it was meant to.
    stray_fence: bool = false,
    /// Of its file system, where the disk engine has lanes.
    lane: ?*Lane = null,
    /// Its lane's: bytes written since its disk was last told to begin with them.
    unsent_bytes: u64 = 0,
    /// For what takes longer than a write: checkpoints' syncs, and writing it again from the log.
    long_lane: ?*Lane = null,
    errand: enum { sync, release, rewrite } = .sync,
    /// A sync in the queue, behind all that stood there.
    sync_run: applier.Run = .sync,
    queue_syncing: bool = false,
    /// All that was ever queued is in the file and synced.
    queue_synced: bool = false,
    /// Where the next append goes, while `end_known`.
    end: u64 = 0,
    end_known: bool = false,
    /// The last LSN that replay would need for this file; 0: none in this life.
    last_lsn: u64 = 0,
    /// Of its last fence: nothing at or below is ever written again.
    fence_lsn: u64 = 0,
    /// The first of its records that no successful sync covers; 0: there is none.
    unsynced_lsn: u64 = 0,
    /// A checkpoint has its sync under way, which covers what stands from here up to the checkpoint.
    syncing: bool = false,
    syncing_lsn: u64 = 0,
    /// Not 0: from here on its records are written again from the log before anything else is written to it.
    rewrite_lsn: u64 = 0,
    /// That is under way, up to here.
    rewriting: bool = false,
    /// A sync of it has failed: pages in memory may be taken for written that the disk has never had. While it is being
    /// rewritten, its lane's.
    pages_suspect: bool = false,
    /// It was said that somebody holds them.
    pages_held: bool = false,
    rewrite_to_lsn: u64 = 0,
    /// The last truncate that was taken since the target fails; 0: none.
    cut_lsn: u64 = 0,
    rewrite_pause_ns: u64 = 0,
    rewrite_at_ns: u64 = 0,
    /// Not 0: the target refused a write, or a sync, with this errno. Nothing new is taken until it is rewritten.
    failed_errno: i32 = 0,
    /// Operations that wait for a log buffer, or until the fence is logged that a foreign truncate asks for; oldest first.
    deferred: waiting.List = .{},
    awaits_fence: bool = false,
    /// Offered to the control thread, which has not answered.
    offered: bool = false,
    /// Its identity stands in the log above the checkpoint.
    identity_lsn: u64 = 0,
    /// What has been said of its name, and is not so yet for all that is known: see names.zig.
    naming: names.Naming = .{},
    release: Release = .{},
    /// In the test stub alone.
    met: stub.Met = .{},
    /// The errand's: what it synced was the name too.
    name_synced: bool = false,
    handle_list: std.ArrayListUnmanaged(HandleRef) = .empty,
    /// Link in the worker's list of files that it knows.
    known: bool = false,
    /// Link in the buffer that is being built (see Buffer.add).
    chain_buffer: ?*Buffer = null,
    chain_first: u32 = 0,
    chain_last: u32 = 0,

    /// Its records up to `lsn` are in the file.
    pub fn isAppliedTo(file: *const File, lsn: u64) bool {
        if (file.chain_buffer) |buffer| if (buffer.records[file.chain_first].lsn <= lsn) return false;
        const first = file.queue.first orelse return true;
        return first.first_lsn > lsn;
    }
};

/// A description of the same inode for `File.sync_fd`. To be had before anything is written by `fd`.
pub fn openForSync(fd: i32) i32 {
    return openAgain(fd, .RDONLY) orelse fd;
}

/// By its inode, whatever its name is now; null where that is not permitted.
pub fn openAgain(fd: i32, access: std.posix.ACCMODE) ?i32 {
    var link: [32]u8 = undefined;
    const path = std.fmt.bufPrintZ(&link, "/proc/self/fd/{d}", .{fd}) catch unreachable;
    return switch (os.descriptor(linux.open(path, .{ .ACCMODE = access, .CLOEXEC = true, .NONBLOCK = true, .NOCTTY = true }, 0))) {
        .fd => |opened| opened,
        .errno => null,
    };
}

/// Before a file is written again after a failure: pages that the kernel failed to write, and counts as written since,
/// go, so that they are read from the disk. (Seen on ext4: such a page's blocks stay marked as never written, and what
/// is written to it again, and synced with success, reads as zeros once the page is gone.) Errno, or 0.
///
/// A page that somebody holds stays: one that is mapped, above all. `all`: then that is an error, EBUSY.
pub fn dropPages(sync_fd: i32, which: enum { all, what_can_go }) i32 {
    // Only what is clean can go.
    const errno = os.check(linux.fdatasync(sync_fd)).err();
    if (errno != 0) return errno;
    const dont_need = 4;
    const dropped = os.check(linux.fadvise(sync_fd, 0, 0, dont_need)).err();
    if (dropped != 0 or which == .what_can_go) return dropped;
    return if (hasPages(sync_fd)) @intFromEnum(linux.E.BUSY) else 0;
}

/// Whether some of the file is in the page cache. false where the kernel does not tell (before Linux 6.5).
fn hasPages(fd: i32) bool {
    const cachestat = 451; // on every architecture
    const range = extern struct { offset: u64, length: u64 }{ .offset = 0, .length = 0 };
    var counts: extern struct { cached: u64, dirty: u64, writeback: u64, evicted: u64, recently_evicted: u64 } = undefined;
    const asked = os.check(linux.syscall4(@enumFromInt(cachestat), @as(usize, @bitCast(@as(isize, fd))), @intFromPtr(&range), @intFromPtr(&counts), 0));
    return asked == .value and counts.cached > 0;
}

/// Closes what a File holds.
pub fn closeDescriptors(file: *const File) void {
    if (file.sync_fd != file.fd) os.close(file.sync_fd);
    os.close(file.fd);
}

/// Why a descriptor is not taken, in the terms of control.Refusal.
pub const Unfit = error{ NotRegular, NotWritable, NoName, SeveralLinks, NoPath, CannotReopen };

/// Looks at a client's descriptor and opens the same inode again with the daemon's own rights, by its path, as
/// replay will. `errno_out`: why, where the system said.
pub fn reopen(client_fd: i32, identity: *Identity, errno_out: *i32) Unfit!i32 {
    const stat = switch (os.statOf(client_fd)) {
        .stat => |stat| stat,
        .errno => |errno| {
            errno_out.* = errno;
            return error.NotRegular;
        },
    };
    if (!stat.isRegular()) return error.NotRegular;
    const flags = os.check(linux.fcntl(client_fd, linux.F.GETFL, 0)).ok() orelse return error.NotWritable;
    const access = flags & 3; // O_ACCMODE
    if (access != 1 and access != 2) return error.NotWritable;
    const o_path = 0o10000000;
    if (flags & o_path != 0) return error.NotWritable;
    if (stat.links == 0) return error.NoName;
    if (stat.links > 1) return error.SeveralLinks;
    const path = os.pathOf(client_fd, &identity.path) orelse return error.NoPath;
    const fd = try openSame(path, stat.device, stat.inode, .WRONLY, errno_out);
    identity.blob = describe(fd, stat, @intCast(path.len));
    return fd;
}

fn openSame(path: [:0]const u8, device: u64, inode: u64, access: std.posix.ACCMODE, errno_out: *i32) Unfit!i32 {
    const flags = linux.O{ .ACCMODE = access, .CLOEXEC = true, .NOFOLLOW = true, .NONBLOCK = true, .NOCTTY = true };
    const fd = switch (os.descriptor(linux.open(path, flags, 0))) {
        .fd => |fd| fd,
        .errno => |errno| {
            errno_out.* = errno;
            return error.CannotReopen;
        },
    };
    switch (os.statOf(fd)) {
        .stat => |stat| if (stat.device == device and stat.inode == inode and stat.isRegular()) return fd,
        .errno => {},
    }
    os.close(fd);
    errno_out.* = @intFromEnum(linux.E.STALE);
    return error.CannotReopen;
}

const FS_IOC_GETVERSION = 0x80087601;

fn describe(fd: i32, stat: os.Stat, path_length: u32) wal.FileIdentity {
    var blob = std.mem.zeroes(wal.FileIdentity);
    blob.inode = stat.inode;
    blob.device = stat.device;
    blob.mode = stat.mode;
    blob.uid = stat.uid;
    blob.gid = stat.gid;
    blob.path_length = path_length;
    blob.inode_generation = generationOf(fd);
    var handle: extern struct { bytes: u32, kind: i32, data: [128]u8 } = .{ .bytes = 128, .kind = 0, .data = undefined };
    var mount: i32 = 0;
    const named = os.check(linux.syscall5(.name_to_handle_at, @as(usize, @bitCast(@as(isize, fd))), @intFromPtr(""), @intFromPtr(&handle), @intFromPtr(&mount), linux.AT.EMPTY_PATH));
    if (named == .value and handle.bytes <= 128) {
        blob.kernel_handle_type = handle.kind;
        blob.kernel_handle_length = handle.bytes;
        @memcpy(blob.kernel_handle[0..handle.bytes], handle.data[0..handle.bytes]);
    }
    return blob;
}

fn generationOf(fd: i32) u32 {
    var generation: c_long = 0;
    const result = os.check(linux.ioctl(fd, FS_IOC_GETVERSION, @intFromPtr(&generation)));
    return if (result == .value) @truncate(@as(u64, @bitCast(generation))) else 0;
}

pub fn readAttribute(fd: i32) ?wal.FileAttribute {
    var attribute: wal.FileAttribute = undefined;
    const length = os.check(linux.fgetxattr(fd, wal.attribute_name, std.mem.asBytes(&attribute), @sizeOf(wal.FileAttribute))).ok() orelse return null;
    if (length != @sizeOf(wal.FileAttribute) or attribute.magic != wal.attribute_magic or attribute.version != wal.version) return null;
    return attribute;
}

pub const Sync = enum { done, left_out };

/// Sets the attribute and makes it, and the file's very existence, durable (unless `sync` is `left_out`). `errno_out`: why
/// it could not.
pub fn mark(fd: i32, path: []const u8, log_uuid: [16]u8, file_id: u64, sync: Sync, errno_out: *i32) error{ NoAttribute, TargetFailed }!void {
    const attribute = wal.FileAttribute{ .magic = wal.attribute_magic, .version = wal.version, .log_uuid = log_uuid, .file_id = file_id };
    const set = os.check(linux.fsetxattr(fd, wal.attribute_name, std.mem.asBytes(&attribute), @sizeOf(wal.FileAttribute), 0)).err();
    errno_out.* = set;
    switch (@as(linux.E, @enumFromInt(set))) {
        .SUCCESS => {},
        // No such attributes there; the file is immutable; another attribute is in the way of this one's size.
        .OPNOTSUPP, .PERM, .ACCES, .RANGE, .@"2BIG" => return error.NoAttribute,
        else => return error.TargetFailed,
    }
    if (sync == .left_out) return;
    errno_out.* = os.check(linux.fsync(fd)).err();
    if (errno_out.* == 0) errno_out.* = syncParent(path);
    if (errno_out.* == 0) return;
    unmark(fd); // it is not taken, and the log has nothing for it
    return error.TargetFailed;
}

pub fn unmark(fd: i32) void {
    _ = os.check(linux.syscall2(.fremovexattr, @as(usize, @bitCast(@as(isize, fd))), @intFromPtr(wal.attribute_name)));
}

/// Makes the name durable. Errno, or 0.
pub fn syncParent(path: []const u8) i32 {
    var buffer: [4096]u8 = undefined;
    const parent = std.fs.path.dirname(path) orelse "/";
    if (parent.len >= buffer.len) return @intFromEnum(linux.E.NAMETOOLONG);
    @memcpy(buffer[0..parent.len], parent);
    buffer[parent.len] = 0;
    const fd = switch (os.descriptor(linux.open(buffer[0..parent.len :0], .{ .DIRECTORY = true, .CLOEXEC = true }, 0))) {
        .fd => |fd| fd,
        .errno => |errno| return errno,
    };
    defer os.close(fd);
    return os.check(linux.fsync(fd)).err();
}

/// A file that cannot be looked for is not one that is not there.
pub const FindError = error{OutOfDescriptors};

/// As `find`, for a file that is missed by nobody: no directory is looked through.
pub fn findNear(identity: *const Identity, others: []const []const u8, log_uuid: [16]u8, file_id: u64) FindError!?i32 {
    var path: [4096:0]u8 = undefined;
    var candidates = Candidates{ .own = identity.pathText(), .others = others };
    while (candidates.next()) |text| {
        @memcpy(path[0..text.len], text);
        path[text.len] = 0;
        if (try openVerified(linux.AT.FDCWD, path[0..text.len :0], identity, log_uuid, file_id)) |fd| return fd;
    }
    candidates.at = 0;
    while (candidates.next()) |text| {
        if (try openByHandle(identity, text, log_uuid, file_id)) |fd| return fd;
    }
    return null;
}

/// Directories of former names that are looked through; the others' paths are tried all the same.
const directories_searched_max = 8;

/// Finds the inode that an identity names, for replay: by its path, by those that it may have got since (the newest
/// last), by the kernel's handle where permitted, or by looking through the directories of all these. Only that very
/// inode will do: same number, same generation, and our attribute with this file id on it.
pub fn find(identity: *const Identity, others: []const []const u8, log_uuid: [16]u8, file_id: u64) FindError!?i32 {
    if (try findNear(identity, others, log_uuid, file_id)) |fd| return fd;
    var candidates = Candidates{ .own = identity.pathText(), .others = others };
    var searched: [directories_searched_max][]const u8 = undefined;
    var count: usize = 0;
    while (candidates.next()) |text| {
        const parent = std.fs.path.dirname(text) orelse "/";
        const again = for (searched[0..count]) |before| {
            if (std.mem.eql(u8, before, parent)) break true;
        } else false;
        if (again) continue;
        if (count == searched.len) break;
        searched[count] = parent;
        count += 1;
        if (try searchDirectory(identity, parent, log_uuid, file_id)) |fd| return fd;
    }
    return null;
}

/// The paths of a file, the likeliest first.
const Candidates = struct {
    own: []const u8,
    others: []const []const u8,
    at: usize = 0,

    fn next(candidates: *Candidates) ?[]const u8 {
        if (candidates.at > candidates.others.len) return null;
        defer candidates.at += 1;
        if (candidates.at == 0) return candidates.own;
        return candidates.others[candidates.others.len - candidates.at];
    }
};

fn openVerified(directory: i32, name: [:0]const u8, identity: *const Identity, log_uuid: [16]u8, file_id: u64) FindError!?i32 {
    const flags = linux.O{ .ACCMODE = .WRONLY, .CLOEXEC = true, .NOFOLLOW = true, .NONBLOCK = true, .NOCTTY = true };
    const fd = try foundBy(linux.openat(directory, name, flags, 0)) orelse return null;
    return verified(fd, identity, log_uuid, file_id);
}

fn foundBy(opened: usize) FindError!?i32 {
    return switch (os.descriptor(opened)) {
        .fd => |fd| fd,
        .errno => |errno| switch (@as(linux.E, @enumFromInt(errno))) {
            .MFILE, .NFILE => error.OutOfDescriptors,
            else => null,
        },
    };
}

fn verified(fd: i32, identity: *const Identity, log_uuid: [16]u8, file_id: u64) ?i32 {
    const good = good: {
        const stat = switch (os.statOf(fd)) {
            .stat => |stat| stat,
            .errno => break :good false,
        };
        // The device number may change from boot to boot; the attribute tells the file system apart.
        if (!stat.isRegular() or stat.inode != identity.blob.inode) break :good false;
        if (identity.blob.inode_generation != 0 and generationOf(fd) != identity.blob.inode_generation) break :good false;
        const attribute = readAttribute(fd) orelse break :good false;
        break :good attribute.file_id == file_id and std.mem.eql(u8, &attribute.log_uuid, &log_uuid);
    };
    if (good) return fd;
    os.close(fd);
    return null;
}

fn openByHandle(identity: *const Identity, path: []const u8, log_uuid: [16]u8, file_id: u64) FindError!?i32 {
    const length = identity.blob.kernel_handle_length;
    if (length == 0 or length > 128) return null;
    var parent: [4096:0]u8 = undefined;
    const directory = std.fs.path.dirname(path) orelse "/";
    @memcpy(parent[0..directory.len], directory);
    parent[directory.len] = 0;
    const mount = try foundBy(linux.open(parent[0..directory.len :0], .{ .DIRECTORY = true, .CLOEXEC = true }, 0)) orelse return null;
    defer os.close(mount);
    const handle: extern struct { bytes: u32, kind: i32, data: [128]u8 } = .{ .bytes = length, .kind = identity.blob.kernel_handle_type, .data = identity.blob.kernel_handle };
    const flags: u32 = @bitCast(linux.O{ .ACCMODE = .WRONLY, .CLOEXEC = true, .NONBLOCK = true });
    const fd = try foundBy(linux.syscall3(.open_by_handle_at, @as(usize, @intCast(mount)), @intFromPtr(&handle), flags)) orelse return null;
    return verified(fd, identity, log_uuid, file_id);
}

const search_entries_max = 100_000;

fn searchDirectory(identity: *const Identity, parent: []const u8, log_uuid: [16]u8, file_id: u64) FindError!?i32 {
    var directory = std.fs.openDirAbsolute(parent, .{ .iterate = true }) catch |err| switch (err) {
        error.ProcessFdQuotaExceeded, error.SystemFdQuotaExceeded => return error.OutOfDescriptors,
        else => return null,
    };
    defer directory.close();
    var iterator = directory.iterate();
    var seen: u32 = 0;
    while (iterator.next() catch return null) |entry| {
        seen += 1;
        if (seen > search_entries_max) return null;
        if (entry.kind != .file and entry.kind != .unknown) continue;
        var name: [256:0]u8 = undefined;
        if (entry.name.len > 255) continue;
        @memcpy(name[0..entry.name.len], entry.name);
        name[entry.name.len] = 0;
        var buffer: linux.Statx = undefined;
        const looked = os.check(linux.statx(directory.fd, name[0..entry.name.len :0], linux.AT.SYMLINK_NOFOLLOW, linux.STATX_INO, &buffer));
        if (looked == .errno or buffer.ino != identity.blob.inode) continue;
        if (try openVerified(directory.fd, name[0..entry.name.len :0], identity, log_uuid, file_id)) |fd| return fd;
    }
    return null;
}
