//! Which descriptors are Elgate's: the table by number, the open files behind it, and the inodes behind those.
//!
//! ```
//!   table[fd] ──▶ File (one per open file description; dup shares it) ──▶ Inode (one per file of this process)
//! ```
//!
//! A look-up of a descriptor that is not Elgate's is one comparison and one load. All memory is reserved at the
//! first start, costs nothing until it is touched, and is never given back: a pointer that is stale still points
//! to a File, and `pin` tells whether it is the one that was meant.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const positions = @import("../format/positions.zig");
const routes = @import("../format/routes.zig");
const system = @import("system.zig");
const session_module = @import("session.zig");
const Lock = @import("lock.zig").Lock;
const RouteName = session_module.RouteName;
const Ticket = session_module.Ticket;
const session = &session_module.process;

pub const descriptors_max = 1 << 20;
/// As many as a daemon has handles.
pub const files_max = positions.handles_max;
const buckets = 4096;

pub const Care = enum(u32) {
    /// Operations on it go through Elgate.
    routed = 0,
    /// One thread is making it native: others wait for the outcome.
    leaving = 1,
    /// Operations on it are done by the caller.
    native = 2,
};

pub const Inode = struct {
    device: u64,
    number: u64,
    birth_ns: u64,
    /// Files on it. Under `pool_lock`.
    references: u32,
    care: Care,
    /// Operations that hold a file of this inode, but only wait for the outcome of `leaving`.
    parked: u32,
    /// Native even after its last descriptor is closed (a mapping may live on).
    native_for_good: bool,
    next: ?*Inode,
    /// The session and the index under which its route was last registered: sequence << 32 | route.
    registered: u64,
    /// Ticket of the last operation of this process on it, or 0. Only grows: a later ring has a higher ordinal.
    last: u64,
    /// Of an operation that is known to be in the file, with all before it; not brought up to date but when a daemon goes.
    settled: u64,
    /// Moves when operations of ours were lost with a ring. Each File reports it once.
    losses: u32,

    pub fn lastTicket(inode: *Inode) Ticket {
        return @bitCast(@atomicLoad(u64, &inode.last, .seq_cst));
    }

    pub fn noteOperation(inode: *Inode, ticket: Ticket) void {
        _ = @atomicRmw(u64, &inode.last, .Max, ticket.bits(), .seq_cst);
    }

    pub fn noteSettled(inode: *Inode, ticket: Ticket) void {
        @atomicStore(u64, &inode.settled, ticket.bits(), .seq_cst);
    }

    /// Nothing of this process is under way.
    pub fn isSettled(inode: *Inode) bool {
        return @atomicLoad(u64, &inode.last, .seq_cst) == @atomicLoad(u64, &inode.settled, .seq_cst);
    }

    pub fn noteLoss(inode: *Inode) void {
        _ = @atomicRmw(u32, &inode.losses, .Add, 1, .seq_cst);
    }

    pub fn currentCare(inode: *Inode) Care {
        return @atomicLoad(Care, &inode.care, .seq_cst);
    }
};

pub const Mode = packed struct(u32) {
    /// Not open for writing: only drained before reads.
    observer: bool = false,
    append: bool = false,
    nonblocking: bool = false,
    /// O_SYNC or O_DSYNC.
    synchronous: bool = false,
    reserved: u28 = 0,
};

pub const File = struct {
    /// Descriptors in the low half, operations in progress ("pins") in the high half. The file goes back to the
    /// pool when both are zero.
    references: u64,
    inode: *Inode,
    mode: Mode,
    /// Some descriptor of it, for registering it again: only a hint.
    descriptor_hint: i32,
    /// The daemon would not take it: the caller does everything natively.
    refused: bool,
    /// Registered again after a reconnect, the daemon would not have it: its records cannot be waited for.
    failed: bool,
    /// An append has moved the end, the kernel's offset has not followed.
    append_pending: bool,

    registration_lock: Lock,
    /// The session in which the four below hold; 0: none.
    registered: u32,
    handle: u32,
    file_id: u64,
    route: u32,
    flags: routes.Flags,
    was_registered: bool,
    route_name: RouteName,
    /// Value of HandleState.error_sequence, and of Inode.losses, that this file has reported.
    errors_seen: u32,
    losses_seen: u32,
    /// The session (high half) and the marks_generation in which the inode had no mark; 0: never seen so.
    unmarked: u64,
    next_free: ?*File,

    pub fn currentMode(file: *File) Mode {
        return @bitCast(@atomicLoad(u32, @as(*u32, @ptrCast(&file.mode)), .monotonic));
    }

    pub fn setMode(file: *File, mode: Mode) void {
        @atomicStore(u32, @as(*u32, @ptrCast(&file.mode)), @bitCast(mode), .monotonic);
    }

    pub fn pins(file: *File) u32 {
        return @intCast(@atomicLoad(u64, &file.references, .seq_cst) >> 32);
    }

    pub fn descriptors(file: *File) u32 {
        return @truncate(@atomicLoad(u64, &file.references, .seq_cst));
    }
};

const one_pin: u64 = 1 << 32;

/// Set once, before the first entry; empty before.
var table: []?*File = &.{};
/// All entries are below.
var table_used: u32 = 0;

var pool_lock: Lock = .{};
var files: []File = &.{};
var files_used: u32 = 0;
var free_files: ?*File = null;
var inodes: []Inode = &.{};
var inodes_used: u32 = 0;
var free_inodes: ?*Inode = null;
var inode_buckets: [buckets]?*Inode = @splat(null);

/// Once per process. Later calls do nothing.
pub fn prepare() error{ OutOfMemory, HeldByThisThread }!void {
    try pool_lock.acquire();
    defer pool_lock.release();
    if (table.len != 0) return;
    const entries = @min(system.hardLimit(.NOFILE), descriptors_max);
    const file_memory = system.reserve(files_max * @sizeOf(File)) orelse return error.OutOfMemory;
    files = @as([*]File, @ptrCast(file_memory.ptr))[0..files_max];
    const inode_memory = system.reserve(files_max * @sizeOf(Inode)) orelse return error.OutOfMemory;
    inodes = @as([*]Inode, @ptrCast(inode_memory.ptr))[0..files_max];
    const table_memory = system.reserve(entries * @sizeOf(?*File)) orelse return error.OutOfMemory;
    table = @as([*]?*File, @ptrCast(table_memory.ptr))[0..entries];
}

/// Whether there is anything at this number. For entry points that need no more.
pub inline fn has(fd: i32) bool {
    const index: u32 = @bitCast(fd); // a negative number is beyond any table
    if (index >= table.len) return false;
    return @atomicLoad(?*File, &table[index], .acquire) != null;
}

/// The file behind a descriptor, held until `unpin`. null: the descriptor is not Elgate's.
pub inline fn pin(fd: i32) ?*File {
    const index: u32 = @bitCast(fd);
    if (index >= table.len) return null;
    if (@atomicLoad(?*File, &table[index], .acquire) == null) return null;
    return pinEntry(index);
}

fn pinEntry(index: u32) ?*File {
    while (true) {
        const file = @atomicLoad(?*File, &table[index], .acquire) orelse return null;
        const seen = @atomicLoad(u64, &file.references, .monotonic);
        // Without descriptors it is on its way to the pool; the entry changes any moment.
        if (@as(u32, @truncate(seen)) == 0) continue;
        if (@cmpxchgWeak(u64, &file.references, seen, seen + one_pin, .seq_cst, .monotonic) != null) continue;
        if (@atomicLoad(?*File, &table[index], .seq_cst) == file) return file;
        unpin(file);
    }
}

/// Called when the last reference goes; set by those who know how to take leave of the daemon.
pub var on_last_reference: *const fn (file: *File) void = &recycle;

pub fn unpin(file: *File) void {
    const before = @atomicRmw(u64, &file.references, .Sub, one_pin, .seq_cst);
    assert(before >= one_pin);
    if (before == one_pin) on_last_reference(file);
}

/// Puts a new file, with one descriptor and one pin, at `fd`. null: no room; the file stays native.
pub fn add(fd: i32, status: system.FileStatus, mode: Mode, name: *const RouteName, flags: routes.Flags) error{HeldByThisThread}!?*File {
    const index: u32 = @bitCast(fd);
    if (index >= table.len) return null;
    try pool_lock.acquire();
    defer pool_lock.release();
    const inode = takeInode(status) orelse return null;
    const file = takeFile() orelse {
        dropInode(inode);
        return null;
    };
    // `references` is kept: a stale pointer may be trying to pin it just now.
    @atomicStore(*Inode, &file.inode, inode, .release);
    file.setMode(mode);
    @atomicStore(i32, &file.descriptor_hint, fd, .monotonic);
    file.refused = false;
    file.failed = false;
    file.append_pending = false;
    file.registration_lock = .{};
    @atomicStore(u32, &file.registered, 0, .release);
    file.handle = 0;
    file.file_id = 0;
    file.route = 0;
    file.flags = flags;
    file.was_registered = false;
    @atomicStore(u64, &file.unmarked, 0, .monotonic);
    file.route_name = name.*;
    file.errors_seen = 0;
    file.losses_seen = @atomicLoad(u32, &inode.losses, .acquire);
    @atomicStore(u64, &file.references, one_pin + 1, .seq_cst);
    put(index, file);
    if (!mode.observer) session_module.Counters.add(&session.counters.routed_files, 1);
    return file;
}

fn put(index: u32, file: *File) void {
    _ = @atomicRmw(u32, &table_used, .Max, index + 1, .release);
    @atomicStore(?*File, &table[index], file, .seq_cst);
}

/// Another descriptor for a pinned file. False: the number is beyond the table.
pub fn share(file: *File, fd: i32) bool {
    const index: u32 = @bitCast(fd);
    if (index >= table.len) return false;
    _ = @atomicRmw(u64, &file.references, .Add, 1, .seq_cst);
    put(index, file);
    return true;
}

/// Takes the descriptor of a pinned file out of the table. True if it was the file's last one: nobody can pin it
/// any more. Null if somebody else has taken it out.
pub fn remove(file: *File, fd: i32) ?bool {
    const index: u32 = @bitCast(fd);
    if (index >= table.len) return null;
    if (@cmpxchgStrong(?*File, &table[index], file, null, .seq_cst, .monotonic) != null) return null;
    const before = @atomicRmw(u64, &file.references, .Sub, 1, .seq_cst);
    assert(@as(u32, @truncate(before)) >= 1);
    if (@as(u32, @truncate(before)) == 1) return true;
    if (@atomicLoad(i32, &file.descriptor_hint, .monotonic) == fd) {
        for (table[0..used()], 0..) |*entry, other| {
            if (@atomicLoad(?*File, entry, .acquire) != file) continue;
            @atomicStore(i32, &file.descriptor_hint, @intCast(other), .monotonic);
            break;
        }
    }
    return false;
}

/// Back to the pool.
pub fn recycle(file: *File) void {
    pool_lock.acquire() catch return; // within its own bookkeeping: one entry of the pool is lost
    defer pool_lock.release();
    dropInode(file.inode);
    file.next_free = free_files;
    free_files = file;
    if (!file.currentMode().observer) session_module.Counters.subtract(&session.counters.routed_files, 1);
}

fn takeFile() ?*File {
    if (free_files) |file| {
        free_files = file.next_free;
        return file;
    }
    if (files_used == files.len) return null;
    files_used += 1;
    return &files[files_used - 1];
}

fn bucketOf(device: u64, number: u64) *?*Inode {
    return &inode_buckets[std.hash.int(device ^ std.math.rotl(u64, number, 17)) % buckets];
}

fn takeInode(status: system.FileStatus) ?*Inode {
    const bucket = bucketOf(status.device, status.inode);
    var link = bucket.*;
    while (link) |inode| : (link = inode.next) {
        if (inode.device == status.device and inode.number == status.inode and inode.birth_ns == status.birth_ns) {
            inode.references += 1;
            return inode;
        }
    }
    const inode = free: {
        if (free_inodes) |free| {
            free_inodes = free.next;
            break :free free;
        }
        if (inodes_used == inodes.len) return null;
        inodes_used += 1;
        break :free &inodes[inodes_used - 1];
    };
    inode.* = .{
        .device = status.device,
        .number = status.inode,
        .birth_ns = status.birth_ns,
        .references = 1,
        .care = .routed,
        .parked = 0,
        .native_for_good = false,
        .next = bucket.*,
        .registered = 0,
        .last = 0,
        .settled = 0,
        .losses = 0,
    };
    bucket.* = inode;
    return inode;
}

fn dropInode(inode: *Inode) void {
    inode.references -= 1;
    if (inode.references > 0 or inode.native_for_good) return;
    var link = bucketOf(inode.device, inode.number);
    while (link.*) |found| : (link = &found.next) {
        if (found != inode) continue;
        link.* = inode.next;
        inode.next = free_inodes;
        free_inodes = inode;
        return;
    }
}

/// Numbers below which entries may be.
pub fn used() u32 {
    return @atomicLoad(u32, &table_used, .acquire);
}

/// Every file of an inode that has descriptors, one after the other; the caller may look, not keep.
pub const Files = struct {
    inode: *const Inode,
    index: u32 = 0,

    pub fn next(iterator: *Files) ?*File {
        while (iterator.index < @atomicLoad(u32, &files_used, .acquire)) {
            const file = &files[iterator.index];
            iterator.index += 1;
            if (@atomicLoad(u64, &file.references, .seq_cst) != 0 and @atomicLoad(*Inode, &file.inode, .acquire) == iterator.inode) return file;
        }
        return null;
    }
};

/// With the session's lock held, between two rings.
pub fn eachInode(context: anytype, comptime visit: fn (@TypeOf(context), *Inode) void) void {
    for (inodes[0..@atomicLoad(u32, &inodes_used, .acquire)]) |*inode| visit(context, inode);
}

/// In a fresh child (where a thread of the parent may have been anywhere: every change above is ordered so that
/// the lists are whole at any moment, at worst one entry short): nobody is in the middle of anything, nothing is registered, nothing is pending.
pub fn forgetParent() void {
    pool_lock.forget();
    for (files[0..files_used]) |*file| {
        file.references = @as(u32, @truncate(file.references));
        file.registration_lock = .{};
        file.registered = 0;
        file.append_pending = false;
        file.failed = false;
    }
    for (inodes[0..inodes_used]) |*inode| {
        inode.last = 0;
        inode.registered = 0;
        inode.parked = 0;
        if (inode.care == .leaving) inode.care = .routed;
    }
}
