/*
 * What fio calls randrw: threads that read and write blocks of 4 KiB at random places, each of a
 * file of its own of 1 MiB: 7 reads to 3 writes, and fsync() after each 32 writes.
 *
 *	randrw DIRECTORY THREADS BLOCKS
 *
 * Prints the nanoseconds that it took.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define FILE_BLOCKS 256

static const char *directory;
static int blocks;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *work(void *number)
{
	unsigned int random = 2463534242u + (unsigned int)(long)number;
	char path[256], data[BLOCK];
	int fd, n, writes = 0;

	memset(data, 'x', sizeof(data));
	snprintf(path, sizeof(path), "%s/%ld", directory, (long)number);
	fd = open(path, O_CREAT | O_RDWR, 0600);
	if (fd < 0)
		fail(path);
	for (n = 0; n < FILE_BLOCKS; n++)
		if (pwrite(fd, data, BLOCK, (off_t)n * BLOCK) != BLOCK)
			fail(path);
	for (n = 0; n < blocks; n++) {
		off_t at;

		random ^= random << 13;
		random ^= random >> 17;
		random ^= random << 5;
		at = (off_t)(random >> 8) % FILE_BLOCKS * BLOCK;
		if (random % 10 < 7) {
			if (pread(fd, data, BLOCK, at) != BLOCK)
				fail(path);
		} else if (pwrite(fd, data, BLOCK, at) != BLOCK || (++writes % 32 == 0 && fsync(fd))) {
			fail(path);
		}
	}
	if (fsync(fd) || close(fd) || unlink(path))
		fail(path);
	return NULL;
}

int main(int argc, char **argv)
{
	struct timespec start, end;
	pthread_t threads[64];
	long count, n;

	if (argc != 4 || (count = atol(argv[2])) < 1 || count > 64)
		return 2;
	directory = argv[1];
	blocks = atoi(argv[3]);
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (n = 0; n < count; n++)
		if (pthread_create(&threads[n], NULL, work, (void *)n))
			fail("pthread_create");
	for (n = 0; n < count; n++)
		pthread_join(threads[n], NULL);
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%lld\n", (end.tv_sec - start.tv_sec) * 1000000000LL + end.tv_nsec - start.tv_nsec);
	return 0;
}
