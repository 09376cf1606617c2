// SPDX-License-Identifier: GPL-2.0-only
/*
 * A stand-in for a driver, for tests of the gate: it loads, says its version
 * where NVIDIA's driver says it, and does one bad deed that the compiler's
 * command line names.
 */
#include <linux/init.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

static int version_show(struct seq_file *m, void *v)
{
	seq_puts(m, "NVRM version: stand-in  1.2.3  today\n");
	return 0;
}

static int __init standin_init(void)
{
#if defined(DEED_OOPS)
	*(volatile int *)0x10 = 1;
#elif defined(DEED_WARN)
	WARN(1, "a stand-in's bad deed\n");
#endif
	if (!proc_mkdir("driver/nvidia", NULL))
		return -ENOMEM;
	if (!proc_create_single("driver/nvidia/version", 0, NULL, version_show)) {
		remove_proc_entry("driver/nvidia", NULL);
		return -ENOMEM;
	}
	return 0;
}

static void __exit standin_exit(void)
{
	remove_proc_subtree("driver/nvidia", NULL);
}

module_init(standin_init);
module_exit(standin_exit);
MODULE_DESCRIPTION("Stands in for a driver in tests");
MODULE_VERSION("1.2.3");
MODULE_LICENSE("GPL");
