/* SQLite, WAL and synchronous=FULL: a commit returns after the sync of its log.
 *
 *     sqlite DATABASE own       one connection that commits each record by itself; start it once per client
 *     sqlite DATABASE writer    one writer thread for the clients (threads here): what has queued up while it
 *                               committed is its next transaction, the group commit that SQLite leaves to programs
 */
#include "client.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static sqlite3 *database;
static sqlite3_stmt *begin, *insert, *commit;
static bool has_writer;

/* What the clients have queued for the batch that gathers. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t queued = PTHREAD_COND_INITIALIZER;
static const char *queue[CLIENTS_MAX];
static unsigned waiting;
static uint32_t batch = 2;
/* The last committed one of the even and of the odd batches: a wake reaches those whose batch is durable now, and not
 * those of the batch that gathers. */
static _Atomic uint32_t committed[2];

static void check(int result)
{
    if (result != SQLITE_OK && result != SQLITE_DONE && result != SQLITE_ROW) fail("sqlite", sqlite3_errmsg(database));
}

static void step(sqlite3_stmt *statement)
{
    check(sqlite3_step(statement));
    check(sqlite3_reset(statement));
}

static sqlite3_stmt *prepare(const char *text)
{
    sqlite3_stmt *statement;
    check(sqlite3_prepare_v3(database, text, -1, SQLITE_PREPARE_PERSISTENT, &statement, NULL));
    return statement;
}

static void insert_record(const char *record)
{
    check(sqlite3_bind_blob(insert, 1, record, PAYLOAD_BYTES, SQLITE_STATIC));
    step(insert);
}

static void *write_batches(void *unused)
{
    (void)unused;
    const char *records[CLIENTS_MAX];
    for (;;) {
        pthread_mutex_lock(&lock);
        while (waiting == 0) pthread_cond_wait(&queued, &lock);
        unsigned count = waiting;
        memcpy(records, queue, count * sizeof *records);
        uint32_t mine = batch++;
        waiting = 0;
        pthread_mutex_unlock(&lock);

        step(begin);
        for (unsigned i = 0; i < count; i++) insert_record(records[i]);
        step(commit);
        atomic_store(&committed[mine % 2], mine);
        syscall(SYS_futex, &committed[mine % 2], FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
    return NULL;
}

void append_record(unsigned client)
{
    (void)client;
    if (!has_writer) {
        insert_record(payload);
        return;
    }
    pthread_mutex_lock(&lock);
    uint32_t mine = batch;
    queue[waiting] = payload;
    if (waiting++ == 0) pthread_cond_signal(&queued);
    pthread_mutex_unlock(&lock);
    for (;;) {
        uint32_t last = atomic_load(&committed[mine % 2]);
        if ((int32_t)(last - mine) >= 0) return;
        syscall(SYS_futex, &committed[mine % 2], FUTEX_WAIT_PRIVATE, last, NULL, NULL, 0);
    }
}

int main(int count, char **arguments)
{
    if (count != 3) fail("usage", "sqlite DATABASE own|writer");
    has_writer = strcmp(arguments[2], "writer") == 0;
    if (sqlite3_open(arguments[1], &database) != SQLITE_OK) fail(arguments[1], sqlite3_errmsg(database));
    /* Longer than a round: a client that finds the database locked waits. */
    check(sqlite3_busy_timeout(database, 60000));
    check(sqlite3_exec(database, "PRAGMA journal_mode=WAL", NULL, NULL, NULL));
    check(sqlite3_exec(database, "PRAGMA synchronous=FULL", NULL, NULL, NULL));
    check(sqlite3_exec(database, "CREATE TABLE IF NOT EXISTS record (id INTEGER PRIMARY KEY, payload BLOB NOT NULL)",
                       NULL, NULL, NULL));
    begin = prepare("BEGIN IMMEDIATE");
    insert = prepare("INSERT INTO record (payload) VALUES (?)");
    commit = prepare("COMMIT");
    pthread_t writer;
    if (has_writer && pthread_create(&writer, NULL, write_batches, NULL)) fail("pthread_create", "no writer thread");
    return serve();
}
