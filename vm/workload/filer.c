/*
 * Keeps a file system busy with threads.
 *
 *	filer create DIRECTORY THREADS FILES
 *		creates, writes, reads and removes files, each thread in a directory of its own
 *	filer randrw DIRECTORY THREADS BLOCKS
 *		what fio calls randrw: reads and writes blocks of 4 KiB at random places, each
 *		thread of a file of its own of 1 MiB: 7 reads to 3 writes, and fsync() after each
 *		32 writes
 *
 * Prints the nanoseconds that it took.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define FILE_BLOCKS 256

static const char *directory;
static int rounds;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *create(void *number)
{
	char path[256], data[BLOCK];
	struct stat status;
	int round;

	memset(data, 'x', sizeof(data));
	snprintf(path, sizeof(path), "%s/%ld", directory, (long)number);
	if (mkdir(path, 0700) && errno != EEXIST)
		fail(path);
	for (round = 0; round < rounds; round++) {
		int fd;

		snprintf(path, sizeof(path), "%s/%ld/%d", directory, (long)number, round % 16);
		fd = open(path, O_CREAT | O_RDWR, 0600);
		if (fd < 0)
			fail(path);
		if (write(fd, data, sizeof(data)) != sizeof(data) || fstat(fd, &status) ||
		    pread(fd, data, sizeof(data), 0) != sizeof(data))
			fail(path);
		close(fd);
		if (stat(path, &status) || unlink(path))
			fail(path);
	}
	return NULL;
}

static void *randrw(void *number)
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
	for (n = 0; n < rounds; n++) {
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
	void *(*work)(void *);
	long count, n;

	if (argc != 5 || (count = atol(argv[3])) < 1 || count > 64)
		return 2;
	if (!strcmp(argv[1], "create"))
		work = create;
	else if (!strcmp(argv[1], "randrw"))
		work = randrw;
	else
		return 2;
	directory = argv[2];
	rounds = atoi(argv[4]);
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
