/* RocksDB: N threads of one process, each put with sync=true ("fillsync"). Threads that put at the same time form a
 * write group, which the first of them writes and syncs for all: RocksDB's own group commit.
 *
 *     rocksdb DIRECTORY
 */
#include "client.h"

#include <rocksdb/c.h>

static rocksdb_t *database;
static rocksdb_writeoptions_t *durable;

void append_record(unsigned client)
{
    /* A key that sorts behind the client's last one, as an append does. */
    static uint64_t last[CLIENTS_MAX];
    uint64_t key[2] = {__builtin_bswap64(client), __builtin_bswap64(++last[client])};
    char *error = NULL;
    rocksdb_put(database, durable, (const char *)key, sizeof key, payload, PAYLOAD_BYTES, &error);
    if (error) fail("rocksdb_put", error);
}

int main(int count, char **arguments)
{
    if (count != 2) fail("usage", "rocksdb DIRECTORY");
    rocksdb_options_t *options = rocksdb_options_create();
    rocksdb_options_set_create_if_missing(options, 1);
    char *error = NULL;
    database = rocksdb_open(options, arguments[1], &error);
    if (error) fail(arguments[1], error);
    durable = rocksdb_writeoptions_create();
    rocksdb_writeoptions_set_sync(durable, 1);
    int code = serve();
    rocksdb_close(database);
    return code;
}
