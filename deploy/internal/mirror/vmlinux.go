package mirror

import (
	"context"
	"io"

	"github.com/prebake/prebake/pkg/bzimage"
)

// makeVMLinux makes the object vmlinux. COS's buckets have it for programs that read BTF.
func (m *maker) makeVMLinux(ctx context.Context, k kernel) (object, error) {
	return m.object(ctx, "vmlinux of "+k.release, recipe{Kind: "vmlinux", Packages: []pkg{k.image}},
		func(ctx context.Context, w io.Writer) error {
			image, err := kernelImage(ctx, m.apt, k, tree{}, func(string) bool { return false })
			if err != nil {
				return err
			}
			linked, err := bzimage.Linked(image)
			if err != nil {
				return err
			}
			_, err = w.Write(linked)
			return err
		})
}
