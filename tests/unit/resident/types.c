/* The types and functions of the made-up kernel. */
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
typedef unsigned long u64; typedef signed char s8; typedef short s16; typedef int s32;
typedef long s64; typedef int pid_t;
enum color { RED, GREEN = 5 }; enum neg { MINUS = -1, PLUS = 1 };
struct dentry { const unsigned char *name; char iname[8]; };
struct file {
    struct dentry *dentry; int flags; unsigned low : 3, high : 5; int odd : 6; u8 raw[4];
    short nums[2]; enum color color; _Bool ok; double rate; int (*open)(struct file *);
    char *names[2]; struct { pid_t pid; u64 wide : 40; }; long table[4]; char flex[];
};
struct pair { int a; short b[2]; long c; };
struct big { long x[5]; };
struct task_struct { long state; int pid, tgid; struct file *file; char comm[16]; long last; };
typedef struct file file_alias;
struct file first; unsigned long jiffies; int percpu; struct task_struct init;
enum neg neg;
int entry(file_alias *file, char *text, int count, u8 small, _Bool yes, s64 wide, s16 seventh,
          struct pair *eighth, struct pair whole)
{ return file->flags + first.flags; }
struct pair two_words(struct pair pair, enum color color, enum neg sign, struct file *file)
{ pair.a += color; return pair; }
struct big large(int x) { struct big b = {{ x }}; return b; }
void nothing(float rate, struct file *file) {}
struct file *pointer(struct file *file) { return file; }
u8 byte(u8 a, s8 b, u16 c, s16 d, u32 e, s32 f) { return a; }
long words(u64 a, s64 b, u32 c, s32 d, struct pair *p, int n) { return a; }
