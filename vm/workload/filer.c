/*
 * Keeps a file system busy: threads that create, write, read and remove files, each in a directory
 * of its own.
 *
 *	filer DIRECTORY THREADS ROUNDS
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

static const char *directory;
static int rounds;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *work(void *number)
{
	char path[256], data[4096];
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

int main(int argc, char **argv)
{
	struct timespec start, end;
	pthread_t threads[64];
	long count, n;

	if (argc != 4 || (count = atol(argv[2])) < 1 || count > 64)
		return 2;
	directory = argv[1];
	rounds = atoi(argv[3]);
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
