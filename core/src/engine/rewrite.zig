//! What may take long at a target, off the worker: syncing it for a checkpoint, and writing it again from the log where
//! it has refused a write, lost one, or fallen behind. On a thread of its file system (disk/lanes.zig).
//!
//! A sync that failed is never just repeated: the kernel tells of a lost page once, and counts it as clean from then
//! on. All of the file's records that no successful sync covers are written again, then synced.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const wal = @import("../format/wal.zig");
const os = @import("os.zig");
const files = @import("files.zig");
const File = files.File;
const readback = @import("wal/readback.zig");
const storage_module = @import("wal/storage.zig");

/// The file's errand, done: 0, or -errno.
pub fn perform(file: *File) i32 {
    return -switch (file.errand) {
        .sync => sync(file),
        // What has no name any more is nothing that a power cut could take away.
        .release => if (os.linksOf(file.sync_fd) == 0) 0 else sync(file),
        .rewrite => rewrite(file, .done),
    };
}

fn sync(file: *File) i32 {
    // A directory that we may not read keeps the former name in the log, and is no fault of the file's.
    file.name_synced = file.naming.former.len > 0 and files.syncParent(file.identity.pathText()) == 0;
    return os.check(linux.fdatasync(file.sync_fd)).err();
}

/// How long the truncates behind a record leave its file: nothing is written further than that, so that on a full disk they
/// make room for what stands behind them.
pub const Cuts = struct {
    /// In the order of their LSNs; of each other, the later is the longer one.
    list: std.ArrayListUnmanaged(Cut) = .empty,
    next: usize = 0,

    const Cut = struct { lsn: u64, length: u64 };

    pub fn add(cuts: *Cuts, allocator: std.mem.Allocator, lsn: u64, length: u64) error{OutOfMemory}!void {
        while (cuts.list.getLastOrNull()) |before| {
            if (before.length < length) break;
            _ = cuts.list.pop();
        }
        try cuts.list.append(allocator, .{ .lsn = lsn, .length = length });
    }

    /// For the record with this LSN; the next one that is asked for is higher.
    pub fn lengthMax(cuts: *Cuts, lsn: u64) u64 {
        while (cuts.next < cuts.list.items.len and cuts.list.items[cuts.next].lsn <= lsn) cuts.next += 1;
        return if (cuts.next < cuts.list.items.len) cuts.list.items[cuts.next].length else std.math.maxInt(i64);
    }

    /// What will be cut off is, before anything is written. Errno, or 0.
    pub fn begin(cuts: *Cuts, fd: i32) i32 {
        const size = os.sizeOf(fd) orelse return 0;
        const length = cuts.lengthMax(0);
        return if (size > length) os.check(linux.ftruncate(fd, @intCast(length))).err() else 0;
    }

    pub fn clear(cuts: *Cuts) void {
        assert(cuts.next == 0);
        cuts.list.clearRetainingCapacity();
    }

    pub fn deinit(cuts: *Cuts, allocator: std.mem.Allocator) void {
        cuts.list.deinit(allocator);
    }
};

const Writing = struct {
    file: *File,
    fd: i32,
    cuts: Cuts = .{},
    errno: i32 = 0,

    fn survey(context: *anyopaque, header: *const wal.RecordHeader, _: []const u8) error{VisitorStopped}!void {
        const writing: *Writing = @ptrCast(@alignCast(context));
        if (header.file_id != writing.file.file_id or header.kind != @intFromEnum(wal.Kind.truncate)) return;
        writing.cuts.add(writing.file.log.allocator, header.lsn, header.offset) catch {
            writing.errno = @intFromEnum(linux.E.NOMEM);
            return error.VisitorStopped;
        };
    }

    fn visit(context: *anyopaque, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void {
        const writing: *Writing = @ptrCast(@alignCast(context));
        if (header.file_id != writing.file.file_id) return;
        writing.errno = apply(writing.fd, header, payload, writing.cuts.lengthMax(header.lsn));
        if (writing.errno != 0) return error.VisitorStopped;
    }
};

/// Errno, or 0: everything of the file up to `rewrite_to_lsn` is in it, and synced (unless `syncs` are `left_out`).
pub fn rewrite(file: *File, syncs: files.Sync) i32 {
    assert(file.rewrite_lsn > 0);
    // The control thread may have closed the file for writing, since nobody has it open any more. Where its mode was
    // changed since, what was open before still writes.
    const own = files.openAgain(file.sync_fd, .WRONLY);
    defer if (own) |fd| os.close(fd);
    var writing = Writing{ .file = file, .fd = own orelse file.fd };
    defer writing.cuts.deinit(file.log.allocator);
    // Nothing at or below a fence is written again.
    const first_lsn = @max(file.rewrite_lsn, file.fence_lsn + 1);
    readBack(&writing, first_lsn, Writing.survey) catch |err| return errnoOf(&writing, err);
    const cut = writing.cuts.begin(writing.fd);
    if (cut != 0) return cut;
    if (syncs == .done) {
        const dropped = files.dropPages(file.sync_fd, if (file.pages_suspect) .all else .what_can_go);
        if (dropped != 0) {
            file.pages_suspect = true;
            return dropped;
        }
    }
    readBack(&writing, first_lsn, Writing.visit) catch |err| return errnoOf(&writing, err);
    if (syncs == .left_out) return 0;
    const errno = os.check(linux.fdatasync(file.sync_fd)).err();
    if (errno != 0) file.pages_suspect = true;
    return errno;
}

fn readBack(writing: *Writing, first_lsn: u64, visit: @FieldType(readback.Visitor, "visit")) readback.Error!void {
    return readback.readBack(writing.file.log, first_lsn, writing.file.rewrite_to_lsn, .{ .context = writing, .visit = visit });
}

fn errnoOf(writing: *const Writing, err: readback.Error) i32 {
    return switch (err) {
        error.VisitorStopped => writing.errno,
        error.OutOfMemory => @intFromEnum(linux.E.NOMEM),
        else => |other| storage_module.errnoOf(other),
    };
}

/// Brings one record into its target, as far as `length_max` bytes from its beginning; what is no change of a file's
/// content is left out. Errno, or 0.
pub fn apply(fd: i32, header: *const wal.RecordHeader, payload: []const u8, length_max: u64) i32 {
    const room = length_max -| header.offset;
    switch (@as(wal.Kind, @enumFromInt(header.kind))) {
        .write => return writeAll(fd, payload[0..@min(payload.len, room)], header.offset),
        .truncate => return os.check(linux.ftruncate(fd, @intCast(header.offset))).err(),
        .allocate => {
            if (payload.len != 8) return 0;
            const length = @min(std.mem.readInt(u64, payload[0..8], .little), room);
            if (length == 0) return 0;
            return os.check(linux.fallocate(fd, @bitCast(header.argument), @intCast(header.offset), @intCast(length))).err();
        },
        else => return 0,
    }
}

pub fn writeAll(fd: i32, payload: []const u8, offset: u64) i32 {
    var done: usize = 0;
    while (done < payload.len) {
        switch (os.check(linux.pwrite(fd, payload.ptr + done, payload.len - done, @intCast(offset + done)))) {
            .value => |count| {
                if (count == 0) return @intFromEnum(linux.E.IO);
                done += count;
            },
            .errno => |errno| if (errno != @intFromEnum(linux.E.INTR)) return errno,
        }
    }
    return 0;
}
