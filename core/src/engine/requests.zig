//! What the control thread asks of the worker, and the answers. A request is made by the control thread, goes
//! to the worker through its mailbox, and comes back through the control thread's.

const std = @import("std");
const control = @import("../format/control.zig");
const File = @import("files.zig").File;
const ServedRing = @import("served_ring.zig").ServedRing;
const rings_max = @import("served_ring.zig").rings_max;
const names = @import("names.zig");

pub const Request = struct {
    kind: Kind,
    session: u64,
    /// Of the message that is to be answered.
    sequence: u32 = 0,
    /// The session's own; not for what concerns a file as a whole.
    ring: ?*ServedRing = null,
    file: ?*File = null,
    /// Where no file is named.
    route: u32 = 0,
    handle: u32 = 0,
    /// The worker acts when all operations of the session below this position of its ring are behind it.
    barrier: u64 = 0,
    /// A fence: the file's handles say so, and the position in each ring below which operations on the file may stand
    /// was read after that. A drain: those positions were read.
    begun: bool = false,
    barriers: [rings_max]u64 = undefined,
    /// A file gets a name that is on no route.
    leaves_route: bool = false,
    /// A name's change, for which there ought to be a fence: it is logged without one.
    unfenced: bool = false,
    /// Answer: the file is native.
    native: bool = false,
    /// A drain: the file's records up to this LSN must be in it. Known once the rings have been looked at. A directory that
    /// moves: what was logged of its files for this request has an LSN from here on.
    lsn: ?u64 = null,
    /// Answered when the log is durable up to here.
    commit_lsn: u64 = 0,
    /// A change of a name. The control thread's to free.
    change: ?*names.Change = null,
    /// Of a file that may not be taken as it is now: why; and the descriptor of the client that asks for it.
    refusal: ?control.Refusal = null,
    client_fd: i32 = -1,
    /// What an earlier daemon called the file, for what the session's ring may hold; 0: none did.
    former_file_id: u64 = 0,
    /// Reason of a fence, for the event.
    reason: u32 = 0,
    /// 0, or why it failed.
    errno: i32 = 0,
    next: ?*Request = null,

    pub fn routeIndex(request: *const Request) u32 {
        return if (request.file) |file| file.route else request.route;
    }

    pub const Kind = enum {
        /// Give out a handle: log the file's identity if the log does not hold it, then let operations in.
        activate,
        /// Take a handle back once its operations are applied.
        release,
        /// Drain, sync, log a fence; the file goes native for good.
        fence,
        /// The worker's own: the same, because somebody who does not go through Elgate appends to the file.
        fence_stray,
        /// The same, because somebody asks for the file who cannot have it routed.
        fence_unfit,
        /// Answer when what stands in the rings for a file now is in it.
        drain,
        /// Log that a file is about to get another name, or to lose its own; or (`moved_below`) all that are known of a
        /// route below a directory.
        moved,
        moved_below,
        removed,
        /// Free the rows of a session that is gone.
        forget_session,
        /// Serve a ring from now on.
        serve_ring,
        /// Stop serving a ring that no session has any more, once it is drained.
        leave_ring,
        /// Worker to control: a client has cut a ring's file short.
        ring_lost,
        /// Worker to control: a file without handles is wholly applied, synced and below the checkpoint.
        offer_file,
        /// The control thread's answer to an offer: let go of the file, unless something came since (EBUSY).
        forget_file,
    };
};

/// Any thread posts; one thread takes. Whoever posts also wakes the taker, by its own means.
pub const Mailbox = struct {
    mutex: std.Thread.Mutex = .{},
    first: ?*Request = null,
    last: ?*Request = null,
    /// So that an empty mailbox costs one load.
    filled: bool = false,

    pub fn post(mailbox: *Mailbox, request: *Request) void {
        mailbox.mutex.lock();
        defer mailbox.mutex.unlock();
        request.next = null;
        if (mailbox.last) |last| last.next = request else mailbox.first = request;
        mailbox.last = request;
        @atomicStore(bool, &mailbox.filled, true, .seq_cst);
    }

    /// All that is there, oldest first.
    pub fn takeAll(mailbox: *Mailbox) ?*Request {
        if (!@atomicLoad(bool, &mailbox.filled, .seq_cst)) return null;
        mailbox.mutex.lock();
        defer mailbox.mutex.unlock();
        defer {
            mailbox.first = null;
            mailbox.last = null;
            @atomicStore(bool, &mailbox.filled, false, .seq_cst);
        }
        return mailbox.first;
    }
};
